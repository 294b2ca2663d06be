"""What people said, what was answered, and what they made of it."""
