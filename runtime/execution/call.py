"""One call of a model, taken apart: what decides which graph serves it, and the tensors that go in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.foreign import transformers as contract
from peftc.passes.ir.roles import Role, Stack
from peftc.runtime.execution import caches, masks, nest


@dataclass(frozen=True)
class Signature:
    """Everything about a call that a trace bakes in. Equal signatures are served by one graph, whatever the sizes.

    `entry` is the submodule called (empty for the model itself); `arguments` pairs names with forms; `flags` are the
    config's own answers for options the call leaves open; `sizes` is not empty only where a trace turned out to be
    bound to sizes, and then names the ones it must have. `mode` is how the graph is widened for virtual tokens: traces
    know none. `gradients` is whether the call keeps any, said only where the model's forward asks.
    """

    entry: str
    training: bool
    arguments: tuple[tuple[str, nest.Form], ...]
    cache: tuple[str, bool] | None
    flags: tuple[object, ...]
    sizes: tuple[tuple[int, ...], ...] = ()
    mode: str = ""
    gradients: bool | None = None

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
        given = dict(self.signature.arguments).get(contract.USE_CACHE)
        flag = self.signature.flags[contract.FLAGS.index(contract.USE_CACHE)]
        return bool(given[1] if given is not None else flag)

    def tensor(self, role: Role, stack: Stack = Stack.ONLY) -> torch.Tensor | None:
        """The argument of this role, if it is given and a tensor."""
        name = contract.name_of(role, stack)
        named = zip(self.signature.tensor_names, self.tensors, strict=True)
        return next((tensor for path, tensor in named if path == name), None)

    @property
    def text(self) -> torch.Tensor | None:
        """The tokens of the call, `[rows, tokens]`, or their embeddings, `[rows, tokens, width]`."""
        tokens = self.tensor(Role.TOKENS)
        return self.tensor(Role.EMBEDDINGS) if tokens is None else tokens

    @property
    def rows(self) -> int:
        """The batch size: the first axis of the first tensor that has one."""
        for tensor in self.tensors:
            if tensor.dim() > 1:
                return tensor.shape[0]
        return 1


def read_call(
    entry: str,
    training: bool,
    config: object,
    arguments: Mapping[str, Any],
    forward: contract.Forward | None = None,
) -> Call:
    """Take a call apart. Arguments that are None are as good as not given; a cache is told by its type, and goes by the
    name that `forward` has for it. Raises UsageError.
    """
    forms: list[tuple[str, nest.Form]] = []
    tensors: list[torch.Tensor] = []
    name, cache = _cache(arguments)
    kind = None if cache is None else caches.kind_of(cache)
    if cache is not None:
        arguments = arguments if forward is None else contract.renamed_cache(arguments, forward, name)
        arguments = masks.fit(arguments, cache, contract.is_encoder_decoder(config))
    for name in sorted(arguments):
        value = arguments[name]
        if value is None:
            continue
        if name in contract.COUNTS and isinstance(value, int):
            value = torch.tensor(value)  # another number each step must not mean another graph
        forms.append((name, nest.flatten(value, tensors, name)))
    flags = tuple(getattr(config, name, None) for name in contract.FLAGS)
    return Call(Signature(entry, training, tuple(forms), kind, flags), tensors, cache)


def _cache(arguments: Mapping[str, Any]) -> tuple[str, Cache | None]:
    found = [name for name, value in arguments.items() if isinstance(value, Cache)]
    if len(found) > 1:
        fail(UsageError, "E502", "a call can take one cache", where=sorted(found)[1])
    return (found[0], arguments[found[0]]) if found else ("", None)


def tensor_names(form: nest.Form, name: str) -> list[str]:
    """The paths of the tensors in a form, in order."""
    if form[0] == nest.TENSOR:
        return [name]
    if form[0] in (nest.FIELDS, nest.MAPPING):
        return [path for key, each in form[2] for path in tensor_names(each, f"{name}.{key}")]
    if form[0] == nest.SEQUENCE:
        return [path for i, each in enumerate(form[2]) for path in tensor_names(each, f"{name}.{i}")]
    return []
