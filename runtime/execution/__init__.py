"""Calls: taken apart, matched with a program, run, put together again; caches, masks, recomputed layers."""
