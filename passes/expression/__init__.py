"""What an expression for a weight is on tensors, and what it does to an activation: the laws of `apply`.

Never here: a method by its name; which node of a graph is rewritten.
"""
