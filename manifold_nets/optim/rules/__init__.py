"""What a step is: inner products, coefficients of each group, one write; pure functions of tensors."""
