"""Tensor files, read as they lie, written atomically and a tensor at a time.

Never here: what a tensor is for.
"""
