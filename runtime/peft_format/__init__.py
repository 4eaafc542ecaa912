"""PEFT's files and ours beside them: configs, tensor names, manifests, read and written.

Never here: a running model; a graph.
"""
