"""The arguments of a module's call: a key that is equal for calls alike, the tensors in order, the cache."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from peftc.runtime.regions.kinds import PLAIN


class OpaqueError(Exception):
    """An argument is of a kind that no graph takes. Says which."""


@dataclass
class Arguments:
    """A call taken apart. `key` has types, sizes and plain values."""

    key: list[Any] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    cache: Cache | None = None

    @property
    def device(self) -> str:
        """The type of device that the call is on."""
        return self.tensors[0].device.type if self.tensors else "cpu"

    @property
    def tokens(self) -> int:
        """How many rows of features there are: what adapters are chosen to be lowered for."""
        if not self.tensors:
            return 1
        first = self.tensors[0]
        width = first.shape[-1] if first.is_floating_point() and first.dim() else 1
        return max(1, first.numel() // max(1, width))

    def alike(self, key: tuple[Any, ...]) -> tuple[Any, ...]:
        """A key that is equal for calls that a program may serve alike: sizes by what a trace is bound to."""
        return *pattern(key), self.tokens.bit_length()

    def take(self, value: Any) -> None:
        """Add one value. Raises OpaqueError."""
        if isinstance(value, torch.Tensor):
            for at, other in enumerate(self.tensors):
                if other is value:  # attention asks whether queries, keys and values are one
                    self.key.append(-1 - at)
                    return
            self.tensors.append(value)
            self.key.append(value.dtype)
            self.key.append(value.shape)
        elif isinstance(value, PLAIN):
            self.key.append(value)
            self.key.append(type(value))
        elif isinstance(value, tuple | list):
            self.key.append(type(value))
            self.key.append(len(value))
            for each in value:
                self.take(each)
        elif isinstance(value, Cache):
            if self.cache is not None and self.cache is not value:
                raise OpaqueError("two caches")
            self.cache = value
            self.key.append(type(value))
            layers = getattr(value, "layers", None)
            self.key.append((type(layers[0]), type(layers[-1])) if layers else None)
        elif isinstance(value, dict):
            self.key.append(type(value))
            for name, each in value.items():
                self.key.append(name)
                self.take(each)
            self.key.append(None)
        else:
            raise OpaqueError(f"a {type(value).__name__}")


def taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """A call's arguments. Raises OpaqueError."""
    found = Arguments()
    found.key.append(len(args))
    for value in args:
        found.take(value)
    for name, value in kwargs.items():
        found.key.append(name)
        found.take(value)
    return found


def pattern(key: Iterable[Any]) -> tuple[Any, ...]:
    """A key with the sizes that a trace is bound to: those of 0 and 1, which broadcast or are empty; -1 for others."""
    return tuple(
        tuple(size if size <= 1 else -1 for size in each) if isinstance(each, torch.Size) else each for each in key
    )
