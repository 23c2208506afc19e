"""A federation on this machine, on synthetic images."""
