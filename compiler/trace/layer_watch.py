"""Watches one layer while it runs: what it does that the nodes of its graph do not tell."""

import random
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy
from torch import nn
from transformers.cache_utils import Cache

from peftc.compiler.trace.layer_form import parts_of
from peftc.compiler.trace.recording import Index, Recorder
from peftc.passes.foreign import transformers as contract
from peftc.runtime.regions.kinds import indices

_WATCH = "_peftc_watch"


class Watch:
    """What was noticed: reasons why a layer's nodes are not all that there is to it, none where they are."""

    def __init__(self, outer: "Watch | None") -> None:
        self.outer = outer  # of the layer that this one is in
        self.reasons: dict[str, None] = {}
        self.inside = False  # whether the cache itself runs
        self.recorder = Recorder()

    def note(self, reason: str) -> None:
        """Something was noticed."""
        self.reasons[reason] = None
        if self.outer is not None:
            self.outer.note(reason)

    @property
    def reason(self) -> str:
        """The first, or nothing."""
        if self.recorder.indexed:
            return "its own number goes into more than its cache"
        return next(iter(self.reasons), "")

    def given(self, name: str, value: Any) -> Any:
        """What a layer gets that asks its cache for something."""
        if isinstance(value, Cache):
            return value
        if isinstance(value, list | dict):
            return _Numbered(self, name, value)
        if isinstance(value, types.MethodType):
            return _Method(self, name, value)
        self.note(f"it asks its cache for {name}")
        return value

    def number(self, value: Any) -> Any:
        """A layer's own number, as a cache is to have it."""
        return value.value if isinstance(value, Index) else value


class _Method:
    """A method of a cache that has to be told a layer's own number."""

    def __init__(self, watch: Watch, name: str, method: Any):
        self.watch, self.name, self.method = watch, name, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = self.watch
        if not any(isinstance(each, Index) for each in (*args, *kwargs.values())):
            watch.note(f"it asks its cache for {self.name}")
        before, watch.inside = watch.inside, True
        try:
            return self.method(*map(watch.number, args), **{k: watch.number(each) for k, each in kwargs.items()})
        finally:
            watch.inside = before


class _Numbered:
    """A list or dictionary of a cache, of which a layer may have what is under its own number."""

    def __init__(self, watch: Watch, name: str, held: Any):
        self.watch, self.name, self.held = watch, name, held

    def _own(self, key: Any) -> Any:
        if not isinstance(key, Index):
            self.watch.note(f"it asks its cache for {self.name} that are not its own")
        return self.watch.number(key)

    def __getitem__(self, key: Any) -> Any:
        return self.held[self._own(key)]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.held[self._own(key)] = value

    def __contains__(self, key: Any) -> bool:
        return self._own(key) in self.held

    def get(self, key: Any, default: Any = None) -> Any:
        return self.held.get(self._own(key), default)

    def __len__(self) -> int:
        self.watch.note(f"it asks its cache how many {self.name} it has")
        return len(self.held)

    def __iter__(self) -> Iterator[Any]:
        self.watch.note(f"it goes through its cache's {self.name}")
        return iter(self.held)

    def __getattr__(self, name: str) -> Any:
        self.watch.note(f"it asks its cache for {self.name}.{name}")
        return getattr(self.held, name)


_CLASSES: dict[type, type] = {}


def _watched_module(base: Any) -> type:
    if base in _CLASSES.values():
        return cast(type, base)
    if base not in _CLASSES:

        def write(self: Any, name: str, value: Any) -> None:
            watch = vars(self).get(_WATCH)
            if watch is not None:
                watch.note(f"it keeps something of a call in {type(self).__name__}.{name}")
            base.__setattr__(self, name, value)

        _CLASSES[base] = _derived(base, {"__setattr__": write})
    return _CLASSES[base]


def _watched_cache(base: Any) -> type:
    if base in _CLASSES.values():
        return cast(type, base)
    if base not in _CLASSES:

        def read(self: Any, name: str) -> Any:
            watch = object.__getattribute__(self, "__dict__").get(_WATCH)
            value = base.__getattribute__(self, name)
            return value if watch is None or watch.inside or name.startswith("__") else watch.given(name, value)

        def length(self: Any) -> int:
            watch = object.__getattribute__(self, "__dict__").get(_WATCH)
            if watch is not None and not watch.inside:
                watch.note("it asks its cache for its length")
            return len(object.__getattribute__(self, "layers"))

        def is_any(self: Any) -> bool:
            # Once there is a layer, there is one for all that follow.
            return bool(object.__getattribute__(self, "layers")) or length(self) > 0

        own: dict[str, Any] = {"__getattribute__": read}
        if base.__len__ is Cache.__len__:
            own |= {"__len__": length, "__bool__": is_any}
        _CLASSES[base] = _derived(base, own)
    return _CLASSES[base]


def _derived(base: Any, namespace: dict[str, Any]) -> type:
    named = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), namespace | named)


@contextmanager
def watched(layer: nn.Module, cache: Cache | None, outer: Watch | None) -> Iterator[Watch]:
    """Inside, the layer runs. Its numbers, its modules and its cache tell what is asked of them and kept in them."""
    watch = Watch(outer)
    numbers = [(layer.get_submodule(path), path, name, value) for path, name, value in indices(layer)]
    caches: list[Any] = [] if cache is None else list(dict.fromkeys((cache, *parts_of(cache))))
    held: list[tuple[Any, type]] = [(each, type(each)) for each in (*layer.modules(), *caches)]
    before, drawn = _containers(layer), (random.getstate(), _numpys())
    try:
        for module, path, name, value in numbers:
            vars(module)[name] = Index(watch.recorder, path, name, value)
        for each, kind in held:
            _become(each, _watched_module(kind) if isinstance(each, nn.Module) else _watched_cache(kind))
            object.__getattribute__(each, "__dict__")[_WATCH] = watch
        yield watch
    finally:
        for each, kind in held:
            _become(each, kind)
            own = object.__getattribute__(each, "__dict__")
            if outer is not None and kind in _CLASSES.values():
                own[_WATCH] = outer
            else:
                own.pop(_WATCH, None)
        for module, _, name, value in numbers:
            vars(module)[name] = value
    if _containers(layer) != before:
        watch.note("it keeps something of a call")
    if (random.getstate(), _numpys()) != drawn:
        watch.note("it draws random numbers that are not torch's")


def is_watched(layer: nn.Module) -> bool:
    """Whether a layer is in another that is watched for what becomes of its number."""
    return any(isinstance(vars(each).get(name), Index) for each in layer.modules() for name in contract.INDICES)


def _become(each: Any, kind: type) -> None:
    object.__setattr__(each, "__class__", kind)


def _containers(layer: nn.Module) -> list[Any]:
    """What the lists and dictionaries of a layer's modules hold, by which objects these are."""
    found: list[Any] = []
    for each in layer.modules():
        for name, value in vars(each).items():
            if isinstance(value, list | dict | set) and not name.endswith("hooks"):
                parts = value.items() if isinstance(value, dict) else value
                found.append((name, [tuple(map(id, part)) if isinstance(part, tuple) else id(part) for part in parts]))
    return found


def _numpys() -> Any:
    state: Any = numpy.random.get_state(legacy=True)
    return (state[0], state[1].tobytes(), *state[2:])
