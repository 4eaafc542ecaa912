"""What each command does, callable from Python; the command line is a thin layer over these.

Never here: printing, options of a command line, exit codes.
"""
