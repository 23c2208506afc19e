"""What a node is, for people and machines. Loads fast, imports no node."""
