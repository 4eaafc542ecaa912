"""What other libraries call things, one or two files a library: arguments, outputs, fields of configs, attributes.

Everything else asks for roles, so that a release which renames something is met here and nowhere else. Only names are
here, and how to find them on what a library hands over.

Never here: an import of the library; a tensor; a graph.
"""
