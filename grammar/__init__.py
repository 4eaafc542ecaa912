"""The adapter language: text, spans, trees, types, method rules, formatting and diagnostics. Never imports torch.

Never here: torch, files other than specs, anything of one model.
"""
