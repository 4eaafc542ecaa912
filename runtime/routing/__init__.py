"""Routes: what says, in each call, how much of which adapter a token is given; the classifier that is trained for it.

Never here: a graph, or how a method is computed.
"""
