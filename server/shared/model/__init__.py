"""What server and learner both decide by about models: arithmetic, merging, text to tokens, seeds."""
