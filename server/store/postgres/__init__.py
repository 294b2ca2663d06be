"""PostgreSQL behind the store."""
