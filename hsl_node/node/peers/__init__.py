"""Asking other nodes, and being asked."""
