"""What server and learner both decide by. It imports neither of them, and torch only inside functions."""
