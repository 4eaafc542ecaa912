"""The user's model, which is never written to: shared, read, fingerprinted.

Never here: a write to the user's model; an adapter.
"""
