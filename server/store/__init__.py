"""What is kept: conversations, votes, versions, rounds. The learner reads and writes it, too."""
