"""The driver: load a model, trace it, resolve a spec against it, run the passes, hand over to the runtime.

The names below are found when they are first used: `peftc fmt` would otherwise wait seconds for torch and transformers,
which it never needs. This is the only place where anything is imported late.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftc.compiler.benching import bench
    from peftc.compiler.builds import Build, build
    from peftc.compiler.checking import check
    from peftc.compiler.checkpoints import decompile, inspect
    from peftc.compiler.drawing import draw
    from peftc.compiler.drifting import drift
    from peftc.compiler.driver import AdaptedModel, apply, load
    from peftc.compiler.explaining import explain
    from peftc.compiler.exporting import export, export_adapters
    from peftc.compiler.fitting import check_fit
    from peftc.compiler.models import FoundModel, find_model
    from peftc.compiler.running import run
    from peftc.grammar.diagnostics import (
        AdapterError,
        CheckpointError,
        Diagnostic,
        ModelError,
        SpecError,
        UsageError,
    )
    from peftc.grammar.elaborate import read_spec
    from peftc.runtime.artifact.artifact import Artifact
    from peftc.runtime.artifact.sampling import Sampling
    from peftc.runtime.rank_callback import RankAllocation

__all__ = [
    "AdaptedModel",
    "AdapterError",
    "Artifact",
    "Build",
    "CheckpointError",
    "Diagnostic",
    "FoundModel",
    "ModelError",
    "RankAllocation",
    "Sampling",
    "SpecError",
    "UsageError",
    "apply",
    "bench",
    "build",
    "check",
    "check_fit",
    "decompile",
    "draw",
    "drift",
    "explain",
    "export",
    "export_adapters",
    "find_model",
    "inspect",
    "load",
    "read_spec",
    "run",
]

_HOMES = {
    "peftc.compiler.benching": ("bench",),
    "peftc.compiler.builds": ("Build", "build"),
    "peftc.compiler.checking": ("check",),
    "peftc.compiler.explaining": ("explain",),
    "peftc.compiler.exporting": ("export", "export_adapters"),
    "peftc.compiler.fitting": ("check_fit",),
    "peftc.compiler.checkpoints": ("decompile", "inspect"),
    "peftc.compiler.drawing": ("draw",),
    "peftc.compiler.drifting": ("drift",),
    "peftc.compiler.driver": ("AdaptedModel", "apply", "load"),
    "peftc.compiler.models": ("FoundModel", "find_model"),
    "peftc.compiler.running": ("run",),
    "peftc.grammar.diagnostics": (
        "AdapterError",
        "CheckpointError",
        "Diagnostic",
        "ModelError",
        "SpecError",
        "UsageError",
    ),
    "peftc.grammar.elaborate": ("read_spec",),
    "peftc.runtime.artifact.artifact": ("Artifact",),
    "peftc.runtime.artifact.sampling": ("Sampling",),
    "peftc.runtime.rank_callback": ("RankAllocation",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
