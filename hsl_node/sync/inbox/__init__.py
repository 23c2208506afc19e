"""From a peer: the listening socket, what it may do there, and how what arrives is checked."""
