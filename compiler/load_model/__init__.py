"""From a name or a directory to a model in memory, quantized where a spec says so, and its tokenizer.

Never here: a plan, a graph.
"""
