"""What the graph says: scales and shifts followed from weight to output, operation by operation."""
