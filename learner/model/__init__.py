"""The policy in training, passes over it, rollouts and features."""
