"""What a graph costs to run, estimated: how one of several lowerings is chosen.

Never here: a measured time; a rewrite.
"""
