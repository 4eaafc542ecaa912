"""W' on real tensors: merging, what it costs, merged checkpoints written weight by weight."""
