"""Which modules are alike, so that one trace serves all of them, and what is attached to one, so that none does."""

import sys
import types
from collections.abc import Callable, Collection, Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from peftc.passes.foreign import transformers as contract
from peftc.passes.plan.plain import plain_class
from peftc.passes.quantized.schemes.known import packed

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The dictionaries that a module keeps its hooks in."""

OWN = frozenset(vars(nn.Module())) - {"training"}
"""What `nn.Module` itself keeps in a module, beside whether it is in training."""

_LEFT_OUT = OWN | {"training"} | frozenset(contract.INDICES)

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

DEEP = 6
"""How many containers in one another are looked into."""

GLOBAL_HOOKS = tuple(
    value
    for name, value in vars(torch_module).items()
    if name.startswith("_global_") and name.endswith("_hooks") and isinstance(value, dict)
)


def hooked_everywhere() -> bool:
    """Whether some hook is called for every module there is."""
    return any(GLOBAL_HOOKS)


def attached(module: nn.Module, path: str = "", ignored: Callable[[Any], bool] = lambda _: False) -> str:
    """What has been attached to a module inside of this one, which has to be called for it to run; empty for nothing.

    What is attached to the module itself runs around its program. Hooks that are `ignored` may as well not run.
    """
    if hooked_everywhere() and any(each is not module for each in module.modules()):
        return "a hook on every module"
    for name, each in module.named_modules():
        if each is module:
            continue
        where = f"{path}.{name}".lstrip(".")
        if any(not ignored(hook) for hooks in HOOKS for hook in vars(each)[hooks].values()):
            return f"a hook on {where}"
        if "forward" in vars(each):
            return f"a forward of its own on {where}"
        if "parametrizations" in each._modules:
            return f"a parametrization of {where}"
    return ""


def split_by(module: nn.Module, path: str) -> str:
    """Why a module cannot be one graph whatever it is called with, as the tree tells; empty where it may be."""
    return attached(module, path) or mixed(module, path)


def mixed(module: nn.Module, path: str, names: Collection[str] | None = None) -> str:
    """Where a part of a module, or one of these parts, is in training and the module is not, or the other way round:
    adapters drop where their own module trains.
    """
    for name, each in module.named_modules():
        if each.training is not module.training and (names is None or name in names):
            return f"{path}.{name} is {'not ' * (not each.training)}in training, and the rest is otherwise".lstrip(".")
    return ""


def fingerprint(module: nn.Module) -> Hashable:
    """Equal for modules that compute alike: classes, children, shapes, types, devices, training and plain attributes.

    Of attributes that are no plain values it counts which object it is. A layer's own number in its stack is left out.
    """
    return tuple(_lines(module))


def indices(module: nn.Module) -> tuple[tuple[str, str, int], ...]:
    """The modules inside that know their own number in a stack: path, attribute and number."""
    return tuple(
        (path, name, value)
        for path, each in module.named_modules()
        for name in contract.INDICES
        if isinstance(value := vars(each).get(name), int) and not isinstance(value, bool)
    )


def _lines(module: nn.Module) -> Iterator[Hashable]:
    for path, each in module.named_modules(remove_duplicate=False):
        held = packed(each)
        yield path, plain_class(each), each.training, None if held is None else held.packing
        for group in (each._parameters, each._buffers) if held is None else ():
            yield tuple(
                (name, None if value is None else (tuple(value.shape), value.dtype, value.device))
                for name, value in group.items()
            )
        for name, value in vars(each).items():
            if name not in _LEFT_OUT and not name.startswith("_peftc"):
                yield name, identity(value)


def identity(value: Any, depth: int = 0) -> Hashable:
    """What a value is told from others by: plain ones by what they are, others by which object they are."""
    if depth > DEEP:
        return id(value)
    within = partial(identity, depth=depth + 1)
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, tuple | list) and len(value) < 64:
        return type(value), tuple(map(within, value))
    if isinstance(value, dict) and len(value) < 64 and all(isinstance(key, str) for key in value):
        return dict, tuple((key, within(each)) for key, each in value.items())
    if isinstance(value, torch.Tensor):
        return id(value), value._version if not value.is_inference() else 0
    if isinstance(value, nn.Module):
        return nn.Module, type(value)
    if isinstance(value, partial):
        return partial, *map(within, (value.func, value.args, value.keywords))
    if isinstance(value, types.MethodType):
        return types.MethodType, value.__func__, within(value.__self__)
    if is_record(value):
        return type(value), tuple((name, within(each)) for name, each in vars(value).items())
    return id(value)


def is_record(value: Any) -> bool:
    """Whether a value is a user's own way to keep fields: a dataclass's object, a namespace. Modules look at those."""
    kind = type(value)
    if kind is types.SimpleNamespace:
        return True
    package, fields = kind.__module__.partition(".")[0], getattr(value, "__dict__", None)
    known = package in sys.stdlib_module_names or package in ("torch", "transformers", "peftc", "numpy")
    return not (known or callable(value)) and isinstance(fields, dict) and len(fields) < 64
