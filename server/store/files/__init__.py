"""Files beside the database: published directories, rounds' files, and cleanup after deletions."""
