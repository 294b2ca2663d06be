"""From a model that an operator names to v0000, the frozen reference: what is checked, and how it is stored."""
