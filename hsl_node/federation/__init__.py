"""What was agreed, and who speaks. No wire, no journal."""
