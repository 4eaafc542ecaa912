"""What an expression for a weight is on tensors, and what it does to an activation: the laws of `apply`."""
