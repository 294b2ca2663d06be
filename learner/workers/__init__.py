"""Training by several workers: what one does, and how they are started."""
