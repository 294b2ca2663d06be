"""The chat service: a gRPC server over vLLM and SQLite."""
