"""Backends of an optimizer step: one rule, run weight by weight, in batches, compiled, in C, or on shards."""
