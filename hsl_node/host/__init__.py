"""This machine and its people. Knows no torch; a peer or a round only as a word in a path or a log line."""
