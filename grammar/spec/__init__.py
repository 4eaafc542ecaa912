"""What a file of adapters means: the `Spec`, whether it came from text or from adapter_config.json.

Trees and rules enter, a `Spec` leaves; selectors are matched here, against names only.

Never here: modules and tensors; a selector is matched against names alone.
"""
