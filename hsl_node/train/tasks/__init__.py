"""What is asked of an image, one file per kind of answer."""
