"""What optimizers are compared on: data in three parts, a loss and an error."""
