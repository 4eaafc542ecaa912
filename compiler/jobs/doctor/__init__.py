"""Whether peftc works with what is installed here: versions, devices, and checks on tiny models.

Nothing is downloaded. Checks run in a process of their own, so that a library that crashes is a line of the report.

Never here: a claim about a library that was not run.
"""
