"""A connection to another node: two SFTP clients behind one interface, and the limits of both ends."""
