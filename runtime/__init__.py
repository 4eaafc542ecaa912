"""Adapter parameters, activation, the adapted model and the PEFT checkpoint format.

Never here: how a graph was traced; the text of a spec; the command line.
"""
