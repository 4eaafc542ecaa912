"""Expressions over tensors as terms: operators, shapes, laws, and what a term costs.

Terms enter, terms and sizes leave. No syntax, no method, no torch.

Never here: syntax, spans, methods; which sites there are.
"""
