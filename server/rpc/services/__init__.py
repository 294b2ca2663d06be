"""The gRPC services, one per file."""
