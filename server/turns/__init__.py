"""One turn of a conversation: its prompt, its answers, and what is durable when."""
