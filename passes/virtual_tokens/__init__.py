"""Passes that put virtual tokens in front: of the text, of the cache, of what single attentions see.

Never here: a weight's delta; the cache objects of a library.
"""
