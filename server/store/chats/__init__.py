"""Conversations, answers, and feedback on them."""
