"""Frozen encoders, by the kind of input that they take: each makes one vector of a sample."""
