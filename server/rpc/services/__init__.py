"""The services, one to a file."""
