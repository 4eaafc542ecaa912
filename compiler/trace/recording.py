"""Finds out what a forward reads beside its arguments, and what it does that no graph can do again."""

import builtins
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.exporters.utils import patch_attributes

from peftc.compiler.trace.gradients import Asked
from peftc.compiler.trace.outside import UntraceableError, from_outside
from peftc.compiler.trace.own_backward import own_backward
from peftc.passes.foreign import transformers as contract
from peftc.passes.plan.plain import REGION_OF, plain_class
from peftc.runtime.regions.kinds import OWN
from peftc.runtime.regions.watch import Facts, Read

_GROUPS = ("_parameters", "_buffers", "_modules")


@dataclass
class Recorder:
    """What the modules of a twin were asked for while their forward ran."""

    running: bool = False
    enabled: bool = field(default_factory=torch.is_grad_enabled)  # whether the call keeps gradients
    reads: dict[Read, None] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=dict)  # of modules, by id
    configs: dict[int, tuple[str, str]] = field(default_factory=dict)  # of copied configs: module, and name in it
    gradients: bool = False  # whether it was asked if gradients are kept
    turned: str = ""  # where it turned gradients on or off
    indexed: bool = False  # whether a layer's own number was used for anything but its cache

    def read(self, module: nn.Module, name: str, kept: str = "") -> None:
        """A module was asked for an attribute."""
        path = self.paths.get(id(module))
        if path is not None:
            self.reads[Read(path, name, kept=kept)] = None

    def read_config(self, config: Any, name: str) -> None:
        """A config was asked for a field."""
        found = self.configs.get(id(config))
        if found is not None:
            self.reads[Read(found[0], name, config=found[1])] = None

    def facts(self) -> Facts:
        """All of it."""
        return Facts(tuple(self.reads), self.enabled if self.gradients else None)


class Index:
    """A layer's own number, which tells when it is used for more than to find the layer's cache."""

    def __init__(self, recorder: Recorder, path: str, name: str, value: int):
        self.recorder, self.path, self.name, self.value = recorder, path, name, value

    def _used(self) -> int:
        self.recorder.indexed = True
        return self.value

    def __deepcopy__(self, _: dict[int, Any]) -> "Index":
        return self

    def __index__(self) -> int:
        return self._used()

    def __hash__(self) -> int:
        return hash(self._used())


def _operator(name: str) -> Callable[..., Any]:
    def run(self: Index, *others: Any) -> Any:
        own = self._used()
        return getattr(own, name)(*(each._used() if isinstance(each, Index) else each for each in others))

    return run


for _name in dir(int):
    _fits = _name.startswith("__") and callable(getattr(int, _name)) and _name not in dir(object)
    if (_fits and _name not in ("__index__", "__getnewargs__")) or _name in (
        "__eq__",
        "__ne__",
        "__lt__",
        "__le__",
        "__gt__",
        "__ge__",
        "__str__",
        "__repr__",
        "__format__",
    ):
        setattr(Index, _name, _operator(_name))


_CLASSES: dict[type, type] = {}


def recorded(module: nn.Module, recorder: Recorder) -> None:
    """Have every module of a twin say what it is asked for; its numbers in stacks become such as tell."""
    for path, each in module.named_modules():
        recorder.paths[id(each)] = path
        base = plain_class(each)
        for name in contract.INDICES:
            value = vars(each).get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                vars(each)[name] = Index(recorder, path, name, value)
        if base not in _CLASSES:
            _CLASSES[base] = _recording(base)
        each.__class__ = _CLASSES[base]
        vars(each)["_peftc_recorder"] = recorder


def _recording(base: Any) -> type:
    def read(self: Any, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        recorder = own.get("_peftc_recorder")
        if recorder is None or not recorder.running or name in OWN or name.startswith("__"):
            return base.__getattribute__(self, name)
        if name in own:
            if name not in contract.INDICES and name != "training":
                recorder.read(self, name)
            return base.__getattribute__(self, name)
        try:
            found = base.__getattribute__(self, name)
            if not hasattr(nn.Module, name):
                recorder.read(self, name)  # of the class, where an attribute of the same name would hide it
            return found
        except AttributeError:
            for group in _GROUPS:
                if name in own[group]:
                    if own[group][name] is None:
                        recorder.read(self, name, group)
                    break
            else:
                recorder.read(self, name)
            raise

    def write(self: Any, name: str, value: Any) -> None:
        own = object.__getattribute__(self, "__dict__")
        recorder = own.get("_peftc_recorder")
        if recorder is not None and recorder.running and name not in own["_buffers"]:
            where = recorder.paths.get(id(self), "")
            raise UntraceableError(f"it keeps something of a call in {where}.{name}".replace(" .", " "))
        base.__setattr__(self, name, value)

    namespace = {"__getattribute__": read, "__setattr__": write, "__module__": base.__module__, REGION_OF: base}
    return type(base.__name__, (base,), namespace)


def config_copies(module: nn.Module, recorder: Recorder) -> Mapping[int, Any]:
    """For every config that modules have, a copy that tells what it is asked for, by the id of the config."""
    copies: dict[int, Any] = {}

    def copied(config: Any, path: str, name: str) -> Any:
        if id(config) not in copies:
            made: Any = object.__new__(_config_class(type(config)))
            copies[id(config)] = made
            recorder.configs[id(made)] = (path, name)
            vars(made).update(vars(config))
            for key, value in vars(config).items():
                if isinstance(value, PreTrainedConfig):
                    vars(made)[key] = copied(value, path, f"{name}.{key}")
            vars(made)["_peftc_recorder"] = recorder
        return copies[id(config)]

    for path, each in module.named_modules():
        for name, value in vars(each).items():
            if isinstance(value, PreTrainedConfig):
                copied(value, path, name)
    return copies


def _config_class(base: Any) -> type:
    if base not in _CLASSES:

        def read(self: Any, name: str) -> Any:
            own = object.__getattribute__(self, "__dict__")
            recorder = own.get("_peftc_recorder")
            if recorder is not None and recorder.running and not name.startswith("__"):
                known = type(self).attribute_map.get(name, name)
                if known in own or not hasattr(type(self), known):
                    recorder.read_config(self, known)
            return base.__getattribute__(self, name)

        def deepcopy(self: Any, _: dict[int, Any]) -> Any:
            return self

        namespace = {"__getattribute__": read, "__deepcopy__": deepcopy, "__module__": base.__module__}
        _CLASSES[base] = type(base.__name__, (base,), namespace)
    return _CLASSES[base]


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Inside, a forward runs: what it asks of modules, configs and torch is kept.

    Raises UntraceableError where it drew random numbers that are not torch's: a graph would have those of this once.
    """
    before, drawn = random.getstate(), _numpys()
    recorder.running = True
    try:
        with ExitStack() as stack:
            stack.enter_context(patch_attributes(_patches(recorder)))
            stack.enter_context(own_backward(partial(_has_own_backward, recorder)))
            stack.enter_context(Asked())
            yield
    finally:
        recorder.running = False
        moved = {"Python": random.getstate() != before, "numpy": not _same(_numpys(), drawn)}
        random.setstate(before)
        numpy.random.set_state(drawn)
    for whose, has in moved.items():
        if has:
            raise UntraceableError(f"it draws random numbers of {whose}'s")


def _same(one: Any, other: Any) -> bool:
    return bool((one[1] == other[1]).all()) and bool(one[2:] == other[2:])


def _numpys() -> Any:
    """The state of numpy's global generator, which models use; of its own."""
    state: Any = numpy.random.get_state(legacy=True)
    return (state[0], state[1].copy(), *state[2:])


def _patches(recorder: Recorder) -> list[tuple[Any, str, Callable[[Any], Any]]]:
    def asks(original: Any) -> Any:
        def is_grad_enabled() -> bool:
            if from_outside(sys._getframe(1)):
                recorder.gradients = True
                return recorder.enabled
            return bool(original())

        return is_grad_enabled

    def turns(original: Any) -> Any:
        def enter(self: Any, *args: Any) -> Any:
            if from_outside(sys._getframe(1)):
                recorder.turned = type(self).__name__
            return original(self, *args)

        return enter

    return [
        (builtins, "range", _counting),
        (torch, "is_grad_enabled", asks),
        (torch.set_grad_enabled, "__init__", turns),
        (torch.no_grad, "__enter__", turns),
        (torch.enable_grad, "__enter__", turns),
        (torch.inference_mode, "__enter__", turns),
    ]


def _has_own_backward(recorder: Recorder, name: str) -> None:
    recorder.gradients = True
    if recorder.enabled:
        raise UntraceableError(f"{name} has a backward of its own")


def _counting(original: Any) -> Any:
    """`range` that refuses sizes which a graph leaves open: a loop over one would be unrolled, for this one length."""

    class Kind(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, original)

    class Range(metaclass=Kind):
        def __new__(cls, *ends: Any) -> Any:
            if any(isinstance(each, torch.SymInt) for each in ends) and from_outside(sys._getframe(1)):
                raise UntraceableError("it loops over a size of what it is given")
            return original(*ends)

    return Range
