"""The certificate the other way: symmetries that the numbers show and the structure does not explain."""
