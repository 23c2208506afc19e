"""What was lost, altered or set back."""
