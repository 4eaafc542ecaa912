"""From a live model to a base graph: twins of fake tensors, sample sizes, the exporter.

Never here: an adapter; the user's live weights.
"""
