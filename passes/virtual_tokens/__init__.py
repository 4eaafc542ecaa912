"""Passes that put virtual tokens in front: of the text, of the cache, of what single attentions see."""
