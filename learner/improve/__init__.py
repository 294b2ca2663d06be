"""Ways to improve a policy by a reward model, one to a folder."""
