"""The adapter language: text, spans, trees, types, method rules, formatting and diagnostics. Never imports torch."""
