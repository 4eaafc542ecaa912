"""Tensor files, written atomically and a tensor at a time."""
