"""Ways to improve a policy with a reward model, one per folder."""
