"""Passes that let every row of a call have an adapter of its own.

Never here: which adapters there are, and which row has which.
"""
