"""An operator's work on a data directory."""
