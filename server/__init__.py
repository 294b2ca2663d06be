"""The chat service: gRPC in front, vLLM behind, SQLite beside."""
