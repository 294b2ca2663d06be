"""Versions, rounds, servers, learners, and their lineage."""
