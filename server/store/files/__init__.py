"""Files beside the database: published directories, what rounds keep, and what deletions leave in them."""
