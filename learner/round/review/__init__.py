"""Reviews: what people are asked to compare, and the candidates that they decide about."""
