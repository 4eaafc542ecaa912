"""PEFT's files and ours beside them: tensors by their names, manifests, model cards, read and written.

Never here: a running model; a graph.
"""
