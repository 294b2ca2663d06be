"""Code about models shared by server and learner: dtype, merging, text to tokens, seeds."""
