"""From an adapted model to a directory that needs no peftc: programs, formats, manifests, measured drift.

Never here: the command line; printing; a second trace.
"""
