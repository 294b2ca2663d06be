"""Code shared by server and learner. It imports neither of them, and torch only inside functions."""
