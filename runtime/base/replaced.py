"""Tensors and modules of a model in the place of others: what was there comes back, so that it can be put again."""

from collections.abc import Mapping

import torch
from torch import nn

Replaced = dict[str, torch.Tensor | nn.Module | None]
"""Name of a tensor or module -> what was there: nothing, where a merge gave a module a bias."""


def put(model: nn.Module, tensors: Mapping[str, torch.Tensor | nn.Module | None]) -> Replaced:
    """Replace tensors and modules of the model by others: all of them, or none if it is interrupted.

    Nothing is written to. Returns what was there, last things first: put again, it undoes this one.
    """
    before: Replaced = {}
    try:
        for name, value in tensors.items():
            owner, _, leaf = name.rpartition(".")
            held, new = _place(model.get_submodule(owner), leaf, value)
            before[name] = held[leaf]
            held[leaf] = new
    except BaseException:
        for name, value in reversed(before.items()):
            owner, _, leaf = name.rpartition(".")
            _place(model.get_submodule(owner), leaf, value)[0][leaf] = value
        raise
    return dict(reversed(before.items()))


def _place(
    module: nn.Module, leaf: str, value: torch.Tensor | nn.Module | None
) -> tuple[dict[str, torch.Tensor | nn.Module | None], torch.Tensor | nn.Module | None]:
    """The dictionary of a module that holds this name, and the value as that one is to hold it."""
    held: dict[str, torch.Tensor | nn.Module | None]
    if isinstance(value, nn.Module):
        held = module._modules  # type: ignore[assignment]
        return held, value.train(module.training)
    if leaf in module._parameters:
        held = module._parameters  # type: ignore[assignment]
        if value is None or isinstance(value, nn.Parameter):
            return held, value
        return held, nn.Parameter(value, requires_grad=False)
    held = module._buffers  # type: ignore[assignment]
    return held, value
