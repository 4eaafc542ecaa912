"""Which passes run, in which order, for which purpose."""
