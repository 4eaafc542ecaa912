"""Exported artifacts: read, checked, called and generated from. Needs torch and nothing else.

Never here: transformers, models, passes: what an artifact needs is torch.
"""
