"""This machine and its people. Knows no peer, no round, no torch."""
