"""What an export writes and how, as one value, and which of its options have a meaning. Needs no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args

from peftc.grammar.diagnostics import UsageError, did_you_mean, fail

ExportFormat = Literal["pt2", "aoti", "onnx"]
"""What a program is written as."""

Format = Literal["checkpoint"] | ExportFormat
"""What an adapted model is exported as."""

Adapters = Literal["merged", "inputs", "routed"]
"""Where a program has its adapters: in its weights, among its inputs, or in a bank that each row chooses from."""

Entry = Literal["forward", "generate"]
"""What a program is to be called for."""

CHECKPOINT: Final = "checkpoint"
MERGED: Final = "merged"

CHOICES: Mapping[str, Sequence[str]] = {
    "format": (CHECKPOINT, *get_args(ExportFormat)),
    "adapters": get_args(Adapters),
    "entry": get_args(Entry),
}
_OF_PROGRAMS = ("entry", "max_batch_size", "max_length")


@dataclass(frozen=True)
class Unmeant:
    """An option that was said and changes nothing: its name, why, and what would give it a meaning."""

    option: str
    reason: str
    help: str


@dataclass(frozen=True)
class ExportOptions:
    """What of an adapted model is written, and how: the arguments of `AdaptedModel.export`, which explains them."""

    format: Format = CHECKPOINT
    adapters: Adapters = MERGED
    entry: Entry | None = None  # generate where the model can, else forward
    adapter_names: Sequence[str] | Mapping[str, float] | None = None  # merged: the active ones; else all, no weights
    rank: int | None = None  # of adapters that are added later; the largest of those that are routed
    example_inputs: Mapping[str, Any] | None = None  # named; drawn where it is known how
    tokenizer: Any | None = None  # written too
    max_batch_size: int | None = None  # no limit
    max_length: int | None = None  # as many as the model has positions for
    max_drift: float | None = None  # in units of the largest output; no limit
    min_agreement: float | None = None  # a share of places; no limit
    max_shard_size: int | str | None = None  # in bytes, or as "5GB", which it is
    safe_merge: bool = False
    quantized: Literal["requantize", "dequantize"] | None = None

    @property
    def program_format(self) -> ExportFormat:
        """What programs are written as, where it is programs that are written."""
        assert self.format != CHECKPOINT
        return self.format

    def keywords(self) -> dict[str, Any]:
        """The options that are not left at their default, by name."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}

    def unmeant(self) -> Unmeant | None:
        """The first option that was said and has no meaning for such an export."""
        said = self.keywords()
        if self.format == CHECKPOINT:
            if self.adapters != MERGED:
                reason = "a checkpoint has its adapters merged"
                return Unmeant("adapters", reason, "choose the format pt2, aoti or onnx")
            for option in _OF_PROGRAMS:
                if option in said:
                    reason = "it is for programs, not for a checkpoint"
                    return Unmeant(option, reason, "choose the format pt2, aoti or onnx")
        elif "max_shard_size" in said:
            return Unmeant("max_shard_size", f"it is for checkpoints, not for {self.format}", "leave it out")
        elif "safe_merge" in said and self.adapters != MERGED:
            return Unmeant("safe_merge", "nothing is merged where adapters are inputs or routed", "leave it out")
        if isinstance(self.adapter_names, Mapping) and self.adapters != MERGED:
            reason = "adapters that are inputs or routed have no weights"
            return Unmeant("adapter_names", reason, "give a list of names")
        if "rank" in said and self.adapters != "routed":
            return Unmeant("rank", "it is for a bank that rows choose from", "choose routed adapters")
        return None

    def check(self) -> None:
        """Raise UsageError where an option cannot be what it is, or has no meaning."""
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                help = did_you_mean(str(value), known) or f"it is one of {', '.join(known)}"
                fail(UsageError, "E649", f"{name} cannot be {value!r}", help=help)
        found = self.unmeant()
        if found is not None:
            fail(UsageError, "E640", f"{found.option} has no meaning here: {found.reason}", help=found.help)
        for name in ("max_batch_size", "max_length", "rank"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                fail(UsageError, "E649", f"{name} cannot be {value!r}", help="give a whole number from 1 on")
        drift, agreement = self.max_drift, self.min_agreement
        if drift is not None and not 0 <= drift < math.inf:
            fail(UsageError, "E649", f"max_drift cannot be {drift}", help="give a number from 0 on, such as 1e-4")
        if agreement is not None and not 0 <= agreement <= 1:
            fail(UsageError, "E649", f"min_agreement cannot be {agreement}", help="give a share, from 0 to 1")
