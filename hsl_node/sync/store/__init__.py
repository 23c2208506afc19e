"""What lies on this node's disk."""
