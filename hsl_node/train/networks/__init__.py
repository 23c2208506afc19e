"""Architectures, and the same first weights everywhere."""
