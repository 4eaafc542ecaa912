"""W' on real tensors: merging, what it costs, merged checkpoints written weight by weight, updates made of several.

Never here: a graph; a write into the user's modules.
"""
