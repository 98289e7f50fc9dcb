"""What the numbers say: derivatives that vanish exactly where the function is invariant."""
