"""The store: conversations, votes, versions and rounds. The learner also reads and writes it."""
