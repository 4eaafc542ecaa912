"""adapter_config.json, both ways: what PEFT calls a method, its hyperparameters and what it adapts.

Never here: tensors; a file that is opened.
"""
