"""A round that learns from demonstrations and corrections."""
