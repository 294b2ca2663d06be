"""What learns and serves: versions, rounds, servers, learners, and what came of what."""
