"""A round that learns from votes."""
