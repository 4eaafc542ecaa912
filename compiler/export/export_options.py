"""Which options of an export have a meaning for what is written. Needs no torch."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftc.grammar.diagnostics import UsageError, did_you_mean, fail

CHECKPOINT, MERGED = "checkpoint", "merged"

CHOICES: Mapping[str, Sequence[str]] = {
    "format": (CHECKPOINT, "pt2", "aoti", "onnx"),
    "adapters": (MERGED, "inputs", "routed"),
    "entry": ("forward", "generate"),
}
_OF_PROGRAMS = frozenset(("entry", "max_batch_size", "max_length"))


@dataclass(frozen=True)
class Unmeant:
    """An option that was said and changes nothing: its name, why, and what would give it a meaning."""

    option: str
    reason: str
    help: str


def unmeant(format: str, adapters: str, said: Collection[str]) -> Unmeant | None:
    """The first option that has no meaning for such an export; `said` are those that are not left at their default."""
    if format == CHECKPOINT:
        if adapters != MERGED:
            return Unmeant("adapters", "a checkpoint has its adapters merged", "choose the format pt2, aoti or onnx")
        for each in said:
            if each in _OF_PROGRAMS:
                return Unmeant(each, "it is for programs, not for a checkpoint", "choose the format pt2, aoti or onnx")
    elif "max_shard_size" in said:
        return Unmeant("max_shard_size", f"it is for checkpoints, not for {format}", "leave it out")
    elif "safe_merge" in said and adapters != MERGED:
        return Unmeant("safe_merge", "nothing is merged where adapters are inputs or routed", "leave it out")
    if "adapter_names" in said and adapters == MERGED:
        return Unmeant("adapter_names", "the active adapters are merged", "call set_adapter first")
    return None


def check_options(
    format: str,
    adapters: str,
    *,
    max_batch_size: int | None,
    max_length: int | None,
    max_drift: float | None,
    min_agreement: float | None,
    **others: Any,
) -> None:
    """Raise UsageError where an option of an export cannot be what it is, or has no meaning."""
    sizes = {"max_batch_size": max_batch_size, "max_length": max_length}
    limits = {"max_drift": max_drift, "min_agreement": min_agreement}
    for name, value in {"format": format, "adapters": adapters, "entry": others.get("entry")}.items():
        known = CHOICES[name]
        if value is not None and value not in known:
            help = did_you_mean(str(value), known) or f"it is one of {', '.join(known)}"
            fail(UsageError, "E649", f"{name} cannot be {value!r}", help=help)
    said = [name for name, value in {**others, **sizes, **limits}.items() if value is not None and value is not False]
    found = unmeant(format, adapters, said)
    if found is not None:
        fail(UsageError, "E640", f"{found.option} has no meaning here: {found.reason}", help=found.help)
    for name, value in sizes.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            fail(UsageError, "E649", f"{name} cannot be {value!r}", help="give a whole number from 1 on")
    if max_drift is not None and not 0 <= max_drift < math.inf:
        fail(UsageError, "E649", f"max_drift cannot be {max_drift}", help="give a number from 0 on, such as 1e-4")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        fail(UsageError, "E649", f"min_agreement cannot be {min_agreement}", help="give a share, from 0 to 1")
