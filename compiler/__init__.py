"""The driver: load a model, trace it, resolve a spec against it, run the passes, hand over to the runtime.

The names below are found when they are first used: `peftc fmt` would otherwise wait seconds for torch and transformers,
which it never needs. This is the only place where anything is imported late.

Never here: what a single command does; printing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftc.compiler.api import AdaptedModel, apply, load
    from peftc.compiler.diagram.svg import graphviz
    from peftc.compiler.jobs.benching import bench
    from peftc.compiler.jobs.builds import Build, build
    from peftc.compiler.jobs.checking import check
    from peftc.compiler.jobs.checkpoints import decompile, inspect
    from peftc.compiler.jobs.doctor.doctor import doctor
    from peftc.compiler.jobs.drawing import draw
    from peftc.compiler.jobs.drifting import drift
    from peftc.compiler.jobs.explaining import explain
    from peftc.compiler.jobs.exporting import export, export_adapters
    from peftc.compiler.jobs.fitting import check_fit
    from peftc.compiler.jobs.running import run
    from peftc.compiler.load_model.models import FoundModel, find_model
    from peftc.grammar.diagnostics import (
        AdapterError,
        CheckpointError,
        Diagnostic,
        ModelError,
        SpecError,
        UsageError,
    )
    from peftc.grammar.spec.elaborate import read_spec
    from peftc.runtime.artifact.artifact import Artifact
    from peftc.runtime.artifact.sampling import Sampling
    from peftc.runtime.model.adapter_cache import AdapterCache
    from peftc.runtime.model.rank_callback import RankAllocation
    from peftc.runtime.model.state_dicts import get_peft_model_state_dict, set_peft_model_state_dict
    from peftc.runtime.regions.partition import Partition, RegionRow, SplitRow

__all__ = [
    "AdaptedModel",
    "AdapterCache",
    "AdapterError",
    "Artifact",
    "Build",
    "CheckpointError",
    "Diagnostic",
    "FoundModel",
    "ModelError",
    "Partition",
    "RankAllocation",
    "RegionRow",
    "Sampling",
    "SpecError",
    "SplitRow",
    "UsageError",
    "apply",
    "bench",
    "build",
    "check",
    "check_fit",
    "decompile",
    "doctor",
    "draw",
    "drift",
    "explain",
    "export",
    "export_adapters",
    "find_model",
    "get_peft_model_state_dict",
    "graphviz",
    "inspect",
    "load",
    "read_spec",
    "run",
    "set_peft_model_state_dict",
]

_HOMES = {
    "peftc.compiler.diagram.svg": ("graphviz",),
    "peftc.compiler.jobs.benching": ("bench",),
    "peftc.compiler.jobs.builds": ("Build", "build"),
    "peftc.compiler.jobs.checking": ("check",),
    "peftc.compiler.jobs.explaining": ("explain",),
    "peftc.compiler.jobs.exporting": ("export", "export_adapters"),
    "peftc.compiler.jobs.fitting": ("check_fit",),
    "peftc.compiler.jobs.checkpoints": ("decompile", "inspect"),
    "peftc.compiler.jobs.doctor.doctor": ("doctor",),
    "peftc.compiler.jobs.drawing": ("draw",),
    "peftc.compiler.jobs.drifting": ("drift",),
    "peftc.compiler.api": ("AdaptedModel", "apply", "load"),
    "peftc.compiler.load_model.models": ("FoundModel", "find_model"),
    "peftc.compiler.jobs.running": ("run",),
    "peftc.grammar.diagnostics": (
        "AdapterError",
        "CheckpointError",
        "Diagnostic",
        "ModelError",
        "SpecError",
        "UsageError",
    ),
    "peftc.grammar.spec.elaborate": ("read_spec",),
    "peftc.runtime.artifact.artifact": ("Artifact",),
    "peftc.runtime.artifact.sampling": ("Sampling",),
    "peftc.runtime.model.adapter_cache": ("AdapterCache",),
    "peftc.runtime.model.rank_callback": ("RankAllocation",),
    "peftc.runtime.model.state_dicts": ("get_peft_model_state_dict", "set_peft_model_state_dict"),
    "peftc.runtime.regions.partition": ("Partition", "RegionRow", "SplitRow"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
