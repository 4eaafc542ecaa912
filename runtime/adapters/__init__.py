"""Adapters' tensors: the bank that owns them, ranks that are pruned, slots that graphs read."""
