"""From a model that an operator names to a frozen reference, v0000 at first: what is checked, and how it is stored."""
