"""SQLite: the connection, its migrations and its clock."""
