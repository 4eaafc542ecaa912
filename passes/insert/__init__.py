"""Passes that put adapters of weights into a graph: deltas, trained tokens, copies of modules.

Never here: a law of `apply`; a choice by cost.
"""
