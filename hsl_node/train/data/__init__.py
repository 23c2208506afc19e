"""A hospital's images: found, split, decoded once. No torch."""
