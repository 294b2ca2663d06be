"""One round, from the snapshot of the votes to the version that is served."""
