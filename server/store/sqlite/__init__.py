"""SQLite: the connection, its migrations, its clock."""
