"""Modules of an adapted model whose forward is a program; everything around them runs the user's own Python.

Never here: how a module is traced, what a method is; a change to a module that an adapted model shares with the user's.
"""
