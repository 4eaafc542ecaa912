"""What a program took for granted when it was made, and whether that still holds: a function of microseconds.

It looks at what the trace read and nothing else: attributes of modules and of configs, which modules and which of their
tensors there are, whether they train, whether something is attached to one of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftc.runtime.regions.kinds import GLOBAL_HOOKS, HOOKS

ABSENT = object()


@dataclass(frozen=True)
class Read:
    """An attribute that a forward read while it was traced.

    `path` is the module's, within the region; with `config` the attribute is one of the object that the module has
    under that name, dots for objects inside of it. `kept` is "" for attributes, else where a module keeps None.
    """

    path: str
    name: str
    config: str = ""
    kept: str = ""


@dataclass(frozen=True)
class Facts:
    """What a trace took for granted, beside its module's structure: what it read, and whether gradients were on."""

    reads: tuple[Read, ...] = ()
    gradients: bool | None = None


Holds = Callable[[], bool]


def watch(module: nn.Module, facts: Facts) -> Holds:
    """A function that tells whether everything is as it is now."""
    held: list[Any] = []
    terms: list[str] = []

    def name_of(value: Any) -> str:
        held.append(value)
        return f"v{len(held) - 1}"

    inside = dict(module.named_modules())
    hooks = [vars(each)[kind] for path, each in inside.items() if path for kind in HOOKS]
    if hooks:
        terms.append(f"not any({name_of((*hooks, *GLOBAL_HOOKS))})")
    for path, each in inside.items():
        own = name_of(vars(each))
        terms.append(f"{own}['training'] is {each.training}")
        if path:
            terms.append(f"'forward' not in {own}")
            terms.append(f"{name_of(each)}.__class__ is {name_of(type(each))}")
        for tensors in (each._parameters, each._buffers):
            if tensors:
                kept = name_of(tensors)
                terms += [
                    f"{kept}.get({name!r}) is {'not ' * (value is not None)}None" for name, value in tensors.items()
                ]
        if each._modules:
            children = name_of(each._modules)
            terms.append(f"{own}['_modules'] is {children}")
            terms.append(f"len({children}) == {len(each._modules)}")
            terms += [f"{children}.get({name!r}) is {name_of(child)}" for name, child in each._modules.items()]
    for read in facts.reads:
        terms += _terms(inside.get(read.path), read, name_of)
    if facts.gradients is not None:
        terms.append(f"{name_of(torch.is_grad_enabled)}() is {facts.gradients}")
    names = ", ".join(f"v{index}" for index in range(len(held)))
    made: Callable[..., Holds] = _maker(names, " and ".join(terms))
    return made(*held)


def _terms(module: nn.Module | None, read: Read, name_of: Callable[[Any], str]) -> list[str]:
    if module is None:
        return ["False"]
    owner: Any = module
    for part in filter(None, read.config.split(".")):
        owner = vars(owner).get(part, ABSENT)
    if owner is ABSENT or not hasattr(owner, "__dict__"):
        return ["False"]
    held = vars(owner)[read.kept] if read.kept else vars(owner)
    value = held.get(read.name, ABSENT)
    where, key = name_of(held), repr(read.name)
    if value is ABSENT:
        return [f"{key} not in {where}"]
    now = f"{where}.get({key}, {name_of(ABSENT)})"
    if value is None or isinstance(value, bool):
        return [f"{now} is {value}"]
    if isinstance(value, int | float | str | tuple | torch.dtype | torch.device):
        return [f"{now} == {name_of(value)}"]
    if isinstance(value, list | dict | set):
        try:
            copied = type(value)(value)
            if bool(copied == value):
                return [f"{now} == {name_of(copied)}"]
        except (TypeError, ValueError, RuntimeError):
            pass
    if isinstance(value, torch.Tensor) and not value.is_inference():
        tensor = name_of(value)
        return [f"{now} is {tensor}", f"{tensor}._version == {value._version}"]
    return [f"{now} is {name_of(value)}"]


_MAKERS: dict[tuple[str, str], Callable[..., Holds]] = {}


def _maker(names: str, condition: str) -> Callable[..., Holds]:
    """The function that makes a watch of the values of these names; alike modules have one between them."""
    found = _MAKERS.get((names, condition))
    if found is None:
        scope: dict[str, Any] = {}
        exec(f"def make({names}):\n    return lambda: {condition}", scope)
        found = _MAKERS[names, condition] = scope["make"]
    return found
