"""Weights that are stored packed: operators that stand for them in a graph, and layers of other libraries.

Never here: an unpacked copy that outlives a call; a rewrite.
"""
