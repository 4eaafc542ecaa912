"""Passes that make the same graph cheaper, and never another one.

Never here: anything that changes what a graph computes.
"""
