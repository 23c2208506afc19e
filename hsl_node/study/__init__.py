"""Simulated hospitals: data to try a federation on, without a patient."""
