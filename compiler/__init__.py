"""The driver: load a model, trace it, resolve a spec against it, run the passes, hand over to the runtime."""

from peftc.compiler.driver import apply, load
from peftc.grammar.diagnostics import (
    AdapterError,
    CheckpointError,
    Diagnostic,
    ModelError,
    SpecError,
    UsageError,
)
from peftc.grammar.elaborate import read_spec
from peftc.runtime.model import AdaptedModel

__all__ = [
    "AdaptedModel",
    "AdapterError",
    "CheckpointError",
    "Diagnostic",
    "ModelError",
    "SpecError",
    "UsageError",
    "apply",
    "load",
    "read_spec",
]
