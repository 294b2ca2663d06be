"""Turns of a conversation: the prompt, the answers, and when they are on disk."""
