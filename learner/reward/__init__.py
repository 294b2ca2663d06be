"""From votes to a reward model."""
