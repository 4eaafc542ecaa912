"""The user's model, which is never written to: shared, read, fingerprinted."""
