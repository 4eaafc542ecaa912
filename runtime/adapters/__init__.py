"""Adapters' tensors: the bank that owns them, ranks that are pruned, slots that graphs read.

Never here: a graph; a file; the user's weights.
"""
