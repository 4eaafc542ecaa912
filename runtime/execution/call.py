"""One call of a model, taken apart: what decides which graph serves it, and the tensors that go in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from peftc.grammar.diagnostics import UsageError, fail
from peftc.runtime.execution import caches, masks, nest

COUNTS = ("num_items_in_batch",)
FLAGS = ("use_cache", "output_attentions", "output_hidden_states", "return_dict", "_attn_implementation")


@dataclass(frozen=True)
class Signature:
    """Everything about a call that a trace bakes in. Equal signatures are served by one graph, whatever the sizes.

    `entry` is the submodule called (empty for the model itself); `arguments` pairs names with forms; `flags` are the
    config's own answers for options the call leaves open; `sizes` is not empty only where a trace turned out to be
    bound to sizes, and then names the ones it must have. `mode` is how the graph is widened for virtual tokens: traces
    know none.
    """

    entry: str
    training: bool
    arguments: tuple[tuple[str, nest.Form], ...]
    cache: tuple[str, bool] | None
    flags: tuple[object, ...]
    sizes: tuple[tuple[int, ...], ...] = ()
    mode: str = ""

    @property
    def tensor_names(self) -> list[str]:
        """The paths of the call's tensors, in order."""
        return [path for name, form in self.arguments for path in tensor_names(form, name)]


@dataclass(frozen=True)
class Call:
    """A call: its signature, its tensors in order, its cache if it passes one, and what a widened graph takes more."""

    signature: Signature
    tensors: list[torch.Tensor]
    cache: Cache | None
    extra: tuple[torch.Tensor, ...] = ()
    owner: object = None
    keeps_cache: bool = True  # whether the caller wants a cache back that the model returns

    @property
    def wants_cache(self) -> bool:
        """Whether the call, or else the model's config, asks for a cache."""
        given = dict(self.signature.arguments).get("use_cache")
        return bool(given[1] if given is not None else self.signature.flags[FLAGS.index("use_cache")])

    @property
    def rows(self) -> int:
        """The batch size: the first axis of the first tensor that has one."""
        for tensor in self.tensors:
            if tensor.dim() > 1:
                return tensor.shape[0]
        return 1


def read_call(entry: str, training: bool, config: object, arguments: Mapping[str, Any]) -> Call:
    """Take a call apart. Arguments that are None are as good as not given. Raises UsageError."""
    forms: list[tuple[str, nest.Form]] = []
    tensors: list[torch.Tensor] = []
    cache = _cache(arguments)
    kind = None if cache is None else caches.kind_of(cache)
    if cache is not None:
        arguments = masks.fit(arguments, cache, bool(getattr(config, "is_encoder_decoder", False)))
    for name in sorted(arguments):
        value = arguments[name]
        if value is None:
            continue
        if name in COUNTS and isinstance(value, int):
            value = torch.tensor(value)  # another number each step must not mean another graph
        forms.append((name, nest.flatten(value, tensors, name)))
    flags = tuple(getattr(config, name, None) for name in FLAGS)
    return Call(Signature(entry, training, tuple(forms), kind, flags), tensors, cache)


def _cache(arguments: Mapping[str, Any]) -> Cache | None:
    found = [name for name, value in arguments.items() if isinstance(value, Cache)]
    if len(found) > 1:
        fail(UsageError, "E502", "a call can take one cache", where=sorted(found)[1])
    return arguments[found[0]] if found else None


def tensor_names(form: nest.Form, name: str) -> list[str]:
    """The paths of the tensors in a form, in order."""
    if form[0] == nest.TENSOR:
        return [name]
    if form[0] in (nest.FIELDS, nest.MAPPING):
        return [path for key, each in form[2] for path in tensor_names(each, f"{name}.{key}")]
    if form[0] == nest.SEQUENCE:
        return [path for i, each in enumerate(form[2]) for path in tensor_names(each, f"{name}.{i}")]
    return []
