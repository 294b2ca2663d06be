"""What an operator does to a data directory."""
