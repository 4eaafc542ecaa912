"""LoRA weights as other libraries write them, diffusers and kohya: found, and read as what PEFT would have written.

Never here: a file that is written; a name of a library, which stands in `passes/foreign`.
"""
