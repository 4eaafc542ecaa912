"""How a file of LoRA weights that is not PEFT's names its tensors: what such a table says."""

from collections.abc import Mapping
from dataclasses import dataclass, field

A, B, ALPHA, BIAS, MAGNITUDE = "A", "B", "alpha", "bias", "magnitude"


@dataclass(frozen=True)
class KeyTable:
    """A key is a part's prefix, a module's name and an end; `ends` says which tensor an end is.

    Where `flat`, every dot of the module's name is written as an underscore. `renamed` are regular expressions with
    what stands in a module's name instead; `outer` what may stand in front of all names of a model, and may not.
    `refused` are ends of tensors that belong to another method, with its name. `settings` is the entry of the file's
    metadata that holds PEFT's fields.
    """

    library: str
    parts: tuple[str, ...]
    ends: Mapping[str, str]
    refused: Mapping[str, str]
    flat: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    outer: tuple[str, ...] = ("text_model.",)
    settings: str = ""
