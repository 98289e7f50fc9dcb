"""The remedies: decide from a report what to do about each symmetry, without changing the model."""
