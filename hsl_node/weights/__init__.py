"""What travels: tensors in files, and how many become one. numpy, no torch, no wire."""
