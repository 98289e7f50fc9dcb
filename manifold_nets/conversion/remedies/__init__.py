"""The remedies: what each does about a symmetry, decided from a report without changing the model."""
