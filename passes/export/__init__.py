"""Passes that make a graph leave the house: weights lifted to inputs, sizes named, adapters folded or routed."""
