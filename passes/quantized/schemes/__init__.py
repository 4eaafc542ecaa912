"""Ways to store a weight packed, one file for each.

Never here: what is done with a scheme: one file says how one library stores weights, and no more.
"""
