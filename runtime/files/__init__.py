"""Tensor files, written atomically and a tensor at a time.

Never here: what a tensor is for.
"""
