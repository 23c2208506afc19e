"""One open connection to another node."""
