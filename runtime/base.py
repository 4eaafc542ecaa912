"""The base inside an adapted model: its tensors as they are without what is merged into them."""

from collections.abc import Iterator

import torch
from torch import nn

from peftc.runtime.merge import Replaced
from peftc.runtime.state import BANK


def base_tensors(model: nn.Module, merged: Replaced) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the base's state, without the adapters'."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        own = merged.get(name, tensor)
        if own is not None and not is_adapters(name):
            yield name, own


def is_adapters(name: str) -> bool:
    """Whether a parameter or module belongs to the adapters."""
    return name == BANK or name.startswith(f"{BANK}.")
