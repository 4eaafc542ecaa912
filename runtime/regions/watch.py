"""What a program took for granted when it was made, and whether that still holds: a function of microseconds.

It looks at what the trace read and nothing else: attributes of modules and of configs, which modules and which of their
tensors there are, whether they train, whether something is attached to one of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftc.runtime.regions.kinds import GLOBAL_HOOKS, HOOKS, identity, is_record

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


@dataclass
class Watcher:
    """Gathers what has to be so, as terms over names of values, and makes the function that tells whether it is."""

    held: list[Any] = field(default_factory=list)
    terms: list[str] = field(default_factory=list)

    def name(self, value: Any) -> str:
        """What the terms call a value."""
        self.held.append(value)
        return f"v{len(self.held) - 1}"

    def made(self) -> Holds:
        """The function."""
        names = ", ".join(f"v{index}" for index in range(len(self.held)))
        made: Callable[..., Holds] = _maker(names, " and ".join(self.terms))
        return made(*self.held)

    def tensors(self, module: nn.Module) -> None:
        """A module has the tensors it has, whatever they are."""
        for tensors in (module._parameters, module._buffers):
            if tensors:
                kept = self.name(tensors)
                self.terms += [
                    f"{kept}.get({name!r}) is {'not ' * (value is not None)}None" for name, value in tensors.items()
                ]

    def children(self, own: str, module: nn.Module, but: str = "") -> None:
        """A module has the modules it has; `own` is what its attributes are called."""
        if module._modules:
            children = self.name(module._modules)
            self.terms.append(f"{own}['_modules'] is {children}")
            self.terms.append(f"len({children}) == {len(module._modules)}")
            self.terms += [
                f"{children}.get({name!r}) is {self.name(child)}"
                for name, child in module._modules.items()
                if name != but
            ]

    def read(self, module: nn.Module | None, read: Read) -> None:
        """What was read of a module is what it was."""
        self.terms += _terms(module, read, self.name)


def watch(module: nn.Module, facts: Facts) -> Holds:
    """A function that tells whether everything is as it is now."""
    watcher = Watcher()
    terms, name_of = watcher.terms, watcher.name
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
        watcher.tensors(each)
        watcher.children(own, each)
    for read in facts.reads:
        watcher.read(inside.get(read.path), read)
    if facts.gradients is not None:
        terms.append(f"{name_of(torch.is_grad_enabled)}() is {facts.gradients}")
    return watcher.made()


def while_attached(module: nn.Module) -> Holds:
    """Whether something is attached to a module inside: while it is, only which modules there are matters."""
    children = [(each._modules, dict(each._modules)) for each in module.modules()]
    inside = [vars(each) for each in module.modules() if each is not module]
    hooks = (*(own[kind] for own in inside for kind in HOOKS), *(GLOBAL_HOOKS if inside else ()))
    return lambda: (
        (any(hooks) or any("forward" in own for own in inside)) and all(now == then for now, then in children)
    )


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
    if isinstance(value, int | float | str | torch.dtype | torch.device):
        return [f"{now} == {name_of(value)}"]
    if is_record(value) or (isinstance(value, list | tuple | dict) and _is_nested(value)):
        return [f"{name_of(identity)}({now}) == {name_of(identity(value))}"]
    if isinstance(value, tuple):
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


def _is_nested(value: Any) -> bool:
    """Whether a container holds others, which may change without it."""
    inside = value.values() if isinstance(value, dict) else value
    return any(isinstance(each, list | dict | tuple | set) or is_record(each) for each in inside)


_MAKERS: dict[tuple[str, str], Callable[..., Holds]] = {}


def _maker(names: str, condition: str) -> Callable[..., Holds]:
    """The function that makes a watch of the values of these names; alike modules have one between them."""
    found = _MAKERS.get((names, condition))
    if found is None:
        scope: dict[str, Any] = {}
        exec(f"def make({names}):\n    return lambda: {condition}", scope)
        found = _MAKERS[names, condition] = scope["make"]
    return found
