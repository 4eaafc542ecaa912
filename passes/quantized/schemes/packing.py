"""A weight that a quantization library stores packed: what graphs know of it, and what a scheme does for it."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import nn

Option = bool | int | float | str


@dataclass(frozen=True)
class Packing:
    """How one module stores its weight, apart from the stored tensors themselves.

    `dtype` is what unpacking gives, `compute` what its linear computes in: None for the type of its input. Operators
    carry a packing as `text`, since that is what an exported program can hold.
    """

    scheme: str  # Scheme.name
    label: str  # what users call it: "nf4", "int8"
    out_features: int
    in_features: int
    dtype: torch.dtype
    compute: torch.dtype | None = None
    options: tuple[tuple[str, Option], ...] = ()

    @cached_property
    def text(self) -> str:
        """The packing as JSON."""
        kinds = [each and str(each).removeprefix("torch.") for each in (self.dtype, self.compute)]
        return json.dumps([self.scheme, self.label, self.out_features, self.in_features, *kinds, dict(self.options)])

    @cached_property
    def settings(self) -> Mapping[str, Option]:
        """The options by name."""
        return dict(self.options)

    def number(self, name: str) -> int:
        """An option that is a whole number."""
        return cast(int, self.settings[name])


@lru_cache(maxsize=4096)
def from_text(text: str) -> Packing:
    """The inverse of `Packing.text`."""
    scheme, label, out_features, in_features, kind, compute, options = json.loads(text)
    kinds = getattr(torch, kind), compute and getattr(torch, compute)
    return Packing(scheme, label, out_features, in_features, *kinds, tuple(options.items()))


class Scheme(Protocol):
    """What a library that packs weights has to say for adapters to work on its modules.

    One file adds a scheme: docs/own-scheme.md. It imports its library only where it computes: a module of the library
    in a model proves that it is there.
    """

    name: str
    backend: str  # the package that has to be installed

    def packing(self, module: nn.Module) -> Packing | None:
        """How a module stores its weight; None where the module is not of this scheme."""
        ...

    def parts(self, module: nn.Module) -> tuple[torch.Tensor, ...]:
        """The stored tensors, always in the same order. The module's own, not copies."""
        ...

    def linear(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        parts: Sequence[torch.Tensor],
        packing: Packing,
        training: bool,
    ) -> torch.Tensor:
        """What the module computes of `x`, `[.., in]`: `[.., out]` in the type of `x`. Without gradients."""
        ...

    def unpack(self, parts: Sequence[torch.Tensor], packing: Packing) -> torch.Tensor:
        """The weight, `[out, in]`, in the packing's type."""
        ...

    def share(self, module: nn.Module) -> nn.Module:
        """Another module over the same stored tensors, so that moving or replacing its own leaves this one alone.

        Its bias, if there is one, is a parameter called `bias`, whatever the library holds it in: graphs read it there.
        """
        ...

    def pack(self, weight: torch.Tensor, like: nn.Module) -> nn.Module:
        """Another module like this one that stores `weight`, `[out, in]`, packed as this one's is."""
        ...


@cache
def operators(package: str) -> Any:
    """A library's own operators, known once it is imported: where an exported program runs nobody may have done so."""
    import_module(package)
    return getattr(torch.ops, package)


def is_a(module: nn.Module, file: str, name: str) -> bool:
    """Whether a module is of a library's class, or one derived from it; nothing is imported for that."""
    return any((each.__module__, each.__name__) == (file, name) for each in type(module).__mro__)


def shallow(module: nn.Module) -> nn.Module:
    """Another module object that holds the same tensors and children, in dictionaries of its own."""
    made = copy.copy(module)
    state = {name: copy.copy(value) if isinstance(value, dict) else value for name, value in module.__dict__.items()}
    made.__dict__ = state
    return made


def shared_bias(module: nn.Module) -> nn.Parameter | None:
    """A parameter of its own over the storage of a module's bias."""
    bias = getattr(module, "bias", None)
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
