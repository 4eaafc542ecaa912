"""Passes that make a graph leave the house: weights lifted to inputs, sizes named, adapters folded or routed.

Never here: files, formats; a trace.
"""
