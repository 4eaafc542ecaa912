"""The commands of `peftc`, one file each: what a command reads from its line, and how it tells what came of it.

They call the public names of `peftc.compiler`, as anyone can from Python, and do nothing else of weight.

Never here: work: a command reads its line, calls a job and has it told.
"""
