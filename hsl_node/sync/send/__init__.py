"""To a peer's inbox: again and again until a receipt."""
