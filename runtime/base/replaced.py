"""Tensors and modules of a model in the place of others: what was there comes back, so that it can be put again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

Replaced = dict[str, torch.Tensor | nn.Module | None]
"""Name of a tensor or module -> what was there: nothing, where a merge gave a module a bias."""


def put(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor | nn.Module | None],
    owners: Mapping[str, nn.Module] | None = None,
) -> Replaced:
    """Replace tensors and modules of the model by others: all of them, or none if it is interrupted.

    Nothing is written to. `owners` are the modules that hold some of these names, wherever they are by now. Returns
    what was there, last things first: put again, it undoes this one.
    """
    owners = {} if owners is None else owners
    before: Replaced = {}

    def owner_of(name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return owners[name] if name in owners else model.get_submodule(path), leaf

    try:
        for name, value in tensors.items():
            module, leaf = owner_of(name)
            held, new = held_in(module, leaf), _as_held(module, leaf, value)
            before[name] = held[leaf]
            held[leaf] = new
    except BaseException:
        for name, value in reversed(before.items()):
            module, leaf = owner_of(name)
            held_in(module, leaf)[leaf] = value
        raise
    return dict(reversed(before.items()))


def held_in(module: nn.Module, leaf: str) -> dict[str, torch.Tensor | nn.Module | None]:
    """The dictionary of a module that holds this name."""
    kinds: tuple[Any, ...] = (module._modules, module._parameters, module._buffers)
    held: dict[str, torch.Tensor | nn.Module | None] = next((each for each in kinds if leaf in each), kinds[-1])
    return held


def _as_held(module: nn.Module, leaf: str, value: torch.Tensor | nn.Module | None) -> torch.Tensor | nn.Module | None:
    if isinstance(value, nn.Module):
        return value.train(module.training)
    if value is None or leaf not in module._parameters or isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value, requires_grad=False)
