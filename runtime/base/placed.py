"""What was put into a model for a time: which module holds it, and whether somebody else has changed it since."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftc.runtime.base.replaced import held_in


@dataclass(frozen=True, eq=False)
class Placed:
    """A tensor or module in a module, as it was when it was put there.

    It goes with the module that holds it, wherever that one is: moved, or out of the model. A copy of the whole, by
    `deepcopy` or pickle, is one of the copied module.
    """

    owner: nn.Module
    leaf: str
    parts: tuple[tuple[torch.Tensor, int | None], ...] | None  # tensors with their versions; None: was changed already

    @classmethod
    def now(cls, owner: nn.Module, leaf: str) -> "Placed":
        """What the module holds now."""
        return cls(owner, leaf, _versions(held_in(owner, leaf).get(leaf)))

    @property
    def value(self) -> torch.Tensor | nn.Module | None:
        """What is there now."""
        return held_in(self.owner, self.leaf).get(self.leaf)

    def is_untouched(self) -> bool:
        """Whether there is what was put there, or an equal copy of it."""
        if self.parts is None:
            return False
        found = list(_tensors(self.value))
        return len(found) == len(self.parts) and all(map(_is_as_before, self.parts, found))

    def __reduce__(self) -> Any:
        return _remade, (self.owner, self.leaf, self.value, self.is_untouched())


def _remade(owner: nn.Module, leaf: str, value: torch.Tensor | nn.Module | None, untouched: bool) -> Placed:
    # The owner is not asked: it may not be filled yet.
    return Placed(owner, leaf, _versions(value) if untouched else None)


def _versions(value: torch.Tensor | nn.Module | None) -> tuple[tuple[torch.Tensor, int | None], ...]:
    return tuple((each, _version(each)) for each in _tensors(value))


def _tensors(value: torch.Tensor | nn.Module | None) -> Iterator[torch.Tensor]:
    if isinstance(value, nn.Module):
        yield from value.parameters()
    elif value is not None:
        yield value


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _is_as_before(before: tuple[torch.Tensor, int | None], now: torch.Tensor) -> bool:
    tensor, version = before
    if _version(tensor) != version:
        return False
    alike = (tensor.shape, tensor.dtype, tensor.device) == (now.shape, now.dtype, now.device)
    return now is tensor or (alike and torch.equal(tensor, now))
