"""A module whose forward has no graph, and whose own weights are adapted: its Python runs on the adapted weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from peftc.passes.plan.plain import REGION, plain_class
from peftc.passes.plan.structure import Structure
from peftc.runtime.regions.within import HEAD

Weights = Callable[[], tuple[torch.Tensor, ...]]


def owned_tensors(module: nn.Module, structure: Structure) -> tuple[str, ...]:
    """The adapted tensors that the forward of a region uses itself, by their names below it.

    `structure` is the region's part of one. What lists of modules and of parameters hold is used by what holds them.
    """
    named = [(at.site.user, at.site.weight) for at in structure.sites]
    named += [(copy.target.rpartition(".")[0], copy.target) for copy in structure.copies]
    users = {user: _user(module, user) for user, _ in named}
    return tuple(dict.fromkeys(target[len(HEAD) + 1 :] for user, target in named if users[user] == HEAD))


def has_more(structure: Structure) -> bool:
    """Whether a region has adapters of its own that are no weights: rows of trained tokens, prefixes of attention."""
    return any(each.module == HEAD for each in structure.rows) or any(
        each.site.module == HEAD for each in structure.at("attention")
    )


def _user(module: nn.Module, name: str) -> str:
    while name != HEAD and type(module.get_submodule(name[len(HEAD) + 1 :])).forward is nn.Module.forward:
        name = name.rpartition(".")[0]
    return name


def run_with(
    module: nn.Module, values: Mapping[str, torch.Tensor], args: Iterable[Any], kwargs: Mapping[str, Any]
) -> Any:
    """What a module gives with these tensors in the place of its own. The module stays as it is, for other threads too.

    What its forward writes on it stays there.
    """
    made = _in_place(module, values)
    before = dict(vars(made))
    output = plain_class(module).forward(made, *args, **kwargs)
    for name, value in vars(made).items():
        if before.get(name) is not value:
            vars(module)[name] = value
    return output


def _in_place(module: nn.Module, values: Mapping[str, torch.Tensor]) -> nn.Module:
    """A module like this one, of its class and over its submodules, that holds other tensors."""
    made: nn.Module = object.__new__(type(module))
    vars(made).update(vars(module))
    if REGION in vars(made):
        vars(made)[REGION] = None
    below: dict[str, dict[str, torch.Tensor]] = {}
    vars(made)["_parameters"] = own = dict(module._parameters)
    for name, value in values.items():
        child, _, leaf = name.partition(".")
        if leaf:
            below.setdefault(child, {})[leaf] = value
        else:
            own[name] = value  # type: ignore[assignment]
            vars(made).pop(name, None)  # an attribute comes before a parameter: FSDP and weight norms set such
    if below:
        vars(made)["_modules"] = dict(module._modules)
        for child, held in below.items():
            made._modules[child] = _in_place(module.get_submodule(child), held)
    return made
