"""The register of error codes: what each means and how it is mended, one file for each family of codes.

Never here: the text of a message that is raised; that stands where it is raised.
"""
