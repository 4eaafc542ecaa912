"""What a layer is called with and gives, taken apart: a form that is equal for calls alike, and tensors in order."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, EncoderDecoderCache

from peftc.runtime.regions.kinds import PLAIN


class UnlikeError(Exception):
    """A call of a layer cannot be told from others, or leaves more behind than tensors. Says what."""


_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_ABSENT = "absent"


@dataclass
class Form:
    """Values taken apart. `key` has all but which tensors they are; the same tensor twice is one of `tensors`."""

    key: list[Any] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    cache: Cache | None = None

    def take(self, value: Any) -> "Nest":
        """Add a value. Raises UnlikeError for what is no tensor, no plain value and no cache."""
        leaves, spec = pytree.tree_flatten(value, is_leaf=lambda each: isinstance(each, Cache))
        self.key.append(spec)
        return Nest(spec, tuple(map(self._leaf, leaves)))

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, Cache):
            if self.cache is not None and self.cache is not value:
                raise UnlikeError("two caches")
            self.cache = value
            self.key.append(type(value))
            return value
        self.key.append(plain(value))
        return value

    def tensor(self, value: torch.Tensor) -> "At":
        """The place of a tensor, which is added where it is new."""
        for at, other in enumerate(self.tensors):
            if other is value:
                self.key.append(at)
                return At(at)
        self.tensors.append(value)
        self.key.append(value)
        return At(len(self.tensors) - 1)

    def frozen(self) -> Hashable:
        """What the key says now: of sizes more may be known later."""
        return tuple(_frozen(each) for each in self.key)


@dataclass(frozen=True)
class At:
    """A place among tensors."""

    index: int


@dataclass(frozen=True)
class Nest:
    """Nested values with the places of tensors."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    def filled(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The values with these tensors."""
        leaves = [tensors[each.index] if isinstance(each, At) else each for each in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class CacheState:
    """What the layers of a cache with some numbers hold: `held` by cache and number, `updated` by number."""

    held: tuple[Any, ...]
    updated: tuple[Any, ...]

    def put(self, cache: Cache, numbers: Sequence[int], tensors: Sequence[torch.Tensor]) -> None:
        """Have the layers of a cache hold this. Raises UnlikeError where it has layers of other kinds."""
        for each, layers in zip(parts_of(cache), self.held, strict=True):
            for number, state in zip(numbers, layers, strict=True):
                if state == _ABSENT:
                    continue
                kind, items = state
                while len(each.layers) <= number:
                    made = each.layer_class_to_replicate
                    if made is not kind:
                        raise UnlikeError("its cache makes another kind of layer")
                    each.layers.append(made())
                if type(each.layers[number]) is not kind:
                    raise UnlikeError("its cache has another kind of layer")
                for name, value in items:
                    vars(each.layers[number])[name] = tensors[value.index] if isinstance(value, At) else value
        for number, updated in zip(numbers, self.updated, strict=True):
            if updated != _ABSENT:
                cache.is_updated[number] = updated


def cache_state(form: Form, cache: Cache, numbers: Sequence[int]) -> CacheState:
    """What the layers of a cache with these numbers hold; tensors go into the form. Raises UnlikeError."""
    held = []
    for each in parts_of(cache):
        if not isinstance(getattr(each, "layers", None), list):
            raise UnlikeError(f"its cache is a {type(each).__name__}")
        form.key.append((getattr(each, "layer_class_to_replicate", None), getattr(each, "offloading", False)))
        held.append(tuple(_layer_state(form, each.layers, number) for number in numbers))
    updated: tuple[Any, ...] = (_ABSENT,) * len(numbers)
    if isinstance(cache, EncoderDecoderCache):
        updated = tuple(cache.is_updated.get(number, _ABSENT) for number in numbers)
    form.key.append(updated)
    return CacheState(tuple(held), updated)


def parts_of(cache: Any) -> tuple[Any, ...]:
    """The caches of layers that a cache consists of."""
    if isinstance(cache, EncoderDecoderCache):
        return (cache.self_attention_cache, cache.cross_attention_cache)
    return (cache,)


def _layer_state(form: Form, layers: list[Any], number: int) -> Any:
    if number >= len(layers):
        form.key.append(_ABSENT)
        return _ABSENT
    layer, items = layers[number], list[tuple[str, Any]]()
    form.key.append(type(layer))
    for name, value in sorted(vars(layer).items()):
        form.key.append(name)
        if isinstance(value, torch.Tensor):
            items.append((name, form.tensor(value)))
        else:
            form.key.append(plain(value))
            items.append((name, value))
    return type(layer), tuple(items)


def plain(value: Any) -> Hashable:
    """What a value that is no tensor is told by. Raises UnlikeError."""
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, _SYMBOLS):
        return _Symbol(value)
    if isinstance(value, torch.Size):
        return tuple(map(plain, value))
    raise UnlikeError(f"a {type(value).__name__}")


@dataclass(frozen=True, eq=False)
class _Symbol:
    value: Any


def _frozen(part: Any) -> Hashable:
    if isinstance(part, torch.Tensor):
        sizes = tuple(map(_expression, (*part.shape, *part.stride(), part.storage_offset())))
        return sizes, part.dtype, part.device, part.requires_grad, part.layout
    if isinstance(part, _Symbol):
        return type(part.value), _expression(part.value)
    if type(part) is tuple:
        return tuple(map(_frozen, part))
    found: Hashable = part
    return found


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, _SYMBOLS) else size
