"""The code and constants of a model's classes, which users replace: a method of a class, a function of a module."""

import operator
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

from torch import nn

from peftc.passes.plan.plain import plain_class
from peftc.runtime.regions.kinds import identity, is_record

_LIBRARIES = ("torch", "builtins", "typing", "abc", "peftc", "accelerate", "bitsandbytes", "hqq", "torchao")
_TRANSFORMERS, _MODELS = "transformers", "transformers.models"


def watch_code(model: nn.Module) -> Callable[[], bool]:
    """A function that tells whether the classes of a model's modules, and what their methods read of the Python modules
    they are written in, are as they are now. It takes microseconds: names are looked up, not searched.
    """
    classes = dict.fromkeys(kind for each in model.modules() for kind in plain_class(each).__mro__ if _is_own(kind))
    scopes = [(vars(kind), tuple(name for name in vars(kind) if not name.startswith("__"))) for kind in classes]
    watched: list[tuple[Callable[[str], Any], tuple[str, ...], tuple[Any, ...]]] = []
    containers: list[tuple[Any, Hashable]] = []
    for scope, names in (*scopes, *_read(classes)):
        values = tuple(map(scope.get, names))
        watched.append((scope.get, names, values))
        if scope.get("__module__", scope.get("__name__", "")).partition(".")[0] != _TRANSFORMERS:
            # What transformers keeps in dictionaries is not looked through: these are long, and registries.
            containers += [(each, identity(each)) for each in values if type(each) in (dict, list) or is_record(each)]

    counts = [(vars(kind), len(vars(kind))) for kind in classes]

    def holds() -> bool:
        if any(len(scope) != count for scope, count in counts):
            return False
        if not all(all(map(operator.is_, map(get, names), values)) for get, names, values in watched):
            return False
        return all(identity(value) == before for value, before in containers)

    return holds


def _is_own(kind: type) -> bool:
    """Whether a class is of the model's own code, and not of a library that it is built on."""
    module = kind.__module__
    if module.partition(".")[0] == _TRANSFORMERS:
        return module.startswith(_MODELS)
    return module.partition(".")[0] not in _LIBRARIES


def _read(classes: Mapping[type, None]) -> Iterator[tuple[Mapping[str, Any], tuple[str, ...]]]:
    """What the methods of classes, and the functions they call, read of the Python modules that they are written in."""
    scopes: dict[int, dict[str, Any]] = {}
    names: dict[int, dict[str, None]] = {}
    done: set[int] = set()
    left = [each for kind in classes for value in vars(kind).values() for each in _functions(value)]
    while left:
        function = left.pop()
        if id(function) in done:
            continue
        done.add(id(function))
        scope = function.__globals__
        if str(scope.get("__name__", "")).partition(".")[0] in _LIBRARIES:
            continue
        scopes[id(scope)] = scope
        for name in _names(function.__code__):
            value = scope.get(name)
            if name not in scope or isinstance(value, type | types.ModuleType):
                continue
            names.setdefault(id(scope), {})[name] = None
            left += [each for each in _functions(value) if each.__globals__ is scope]
    for key, found in names.items():
        yield scopes[key], tuple(found)


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The functions of one attribute, decorated or not."""
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    while isinstance(value, types.FunctionType):
        yield value
        value = vars(value).get("__wrapped__")


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _names(each)
