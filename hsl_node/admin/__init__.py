"""An operator's work at a state directory."""
