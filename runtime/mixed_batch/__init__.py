"""Calls whose rows have adapters of their own: which row has which, and the tensors of all rows laid out for graphs.

Never here: a graph, a trace; how a method is computed.
"""
