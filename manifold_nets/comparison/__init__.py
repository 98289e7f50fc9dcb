"""A fair, resumable comparison of optimizers."""
