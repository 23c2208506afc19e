"""What came of it: figures on the test set, predictions, the report."""
