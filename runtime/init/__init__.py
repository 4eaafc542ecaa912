"""First values of adapters' tensors: initialisers, calibration on data, texts, what quantization rounded away.

Never here: a checkpoint's format; a graph.
"""
