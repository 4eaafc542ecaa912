"""W' on real tensors: merging, what it costs, merged checkpoints written weight by weight.

Never here: a graph; a write into the user's modules.
"""
