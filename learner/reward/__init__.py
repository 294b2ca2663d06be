"""Votes to a reward model."""
