"""Calls: taken apart, matched with a program, run, put together again; caches, masks, recomputed layers.

Never here: a rewrite; a file; a decision about which adapters are active.
"""
