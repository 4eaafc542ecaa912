"""Which passes run, in which order, for which purpose.

Never here: a rewrite: passes are put in order here, and written elsewhere.
"""
