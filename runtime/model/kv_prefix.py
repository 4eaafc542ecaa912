"""Prefixes that start from keys and values: those that a text leaves in the cache."""

from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.expression.materialise import Evaluator
from peftc.passes.expression.scene import Eager
from peftc.passes.foreign import transformers as contract
from peftc.passes.plan.plan import PlannedSite
from peftc.passes.plan.vocabulary import vocabulary
from peftc.runtime.adapted.adapted_module import AdaptedModule
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.execution import cache_layers
from peftc.runtime.init.tokens import chat_ids, text_ids
from peftc.runtime.merge.rounding import in_evaluation
from peftc.runtime.model.merging import disabled

Pair = tuple[torch.Tensor, torch.Tensor]
KIND = "cache"


def start_from_text(
    model: AdaptedModule,
    tokenizer: Any,
    text: str,
    adapter_name: str | None,
    *,
    use_chat_template: bool,
    max_length: int | None,
) -> torch.Tensor:
    """Start a prefix as what a text leaves in the cache: see `AdaptedModel.initialize_kv_prefix_from_text`."""
    adapter, at = _prefix(model, adapter_name)
    size = _embedded(model, adapter)
    if tokenizer is None:
        help = "pass the model's own, such as AutoTokenizer.from_pretrained(...)"
        fail(UsageError, "E565", "a text needs a tokenizer", help=help)
    ids = chat_ids(text, tokenizer, size) if use_chat_template else None
    if ids is None:
        options = {} if max_length is None else {"truncation": True, "max_length": max_length}
        ids = text_ids(text, "", tokenizer, size, **options)
    ids, (length, *_) = ids[:max_length], at.front
    if len(ids) < length:
        message = f"the text has {_tokens(len(ids))}, and the prefix of adapter {adapter.plan.name!r} {length}"
        fail(UsageError, "E571", message, help="give a longer text, or make the prefix shorter")
    return _start(adapter, at, _seen(model, adapter, ids[:length]))


def start_from_cache(model: AdaptedModule, past: Any, adapter_name: str | None) -> torch.Tensor:
    """Start a prefix as a cache: see `AdaptedModel.initialize_kv_prefix_from_past_key_values`."""
    adapter, at = _prefix(model, adapter_name)
    return _start(adapter, at, past)


def _prefix(model: AdaptedModule, name: str | None) -> tuple[AdapterParameters, PlannedSite]:
    """The adapter meant, and its place in the cache."""
    state = model._adapter_state
    if name is None:
        found = [each for each, _ in state.active if _in_cache(state.adapter(each))]
        if len(found) != 1:
            count = f"{len(found)} active adapters have" if found else "no active adapter has"
            fail(UsageError, "E569", f"{count} a prefix", help="say which is meant with adapter_name")
        name = found[0]
    adapter = state.adapter(name)
    places = _in_cache(adapter)
    if not places:
        message = f"adapter {name!r} puts nothing in front of the cache"
        fail(UsageError, "E569", message, help="keys and values are what a prefix or cartridge is made of")
    (at,) = places
    if at.site.stacks > 1:
        message = f"adapter {name!r} is for a decoder beside an encoder, whose layers share the places of a prefix"
        fail(UsageError, "E570", message, help="no start gives each of them its own keys and values")
    trained = [each.shape for each in at.bound.params if each.trained]
    if trained != [at.front]:
        _refuse(name)
    return adapter, at


def _embedded(model: AdaptedModule, adapter: AdapterParameters) -> int:
    """How many tokens the model knows. Raises UsageError where a text leaves no keys and values in it."""
    engine = model._adapter_state.engine
    known = vocabulary(engine.backend.survey())
    if known is None or not engine.takes_cache(engine.plain_call("", _texts(model, adapter, [0]))):
        message = f"{type(model).__name__} keeps no cache of a text"
        help = "pass its layers' keys and values to initialize_kv_prefix_from_past_key_values"
        fail(UsageError, "E570", message, help=help)
    return known.size


def _texts(model: AdaptedModule, adapter: AdapterParameters, ids: list[int]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([ids], device=next(adapter.parameters()).device)
    given = {contract.TOKENS: tokens, contract.MASK: torch.ones_like(tokens)}
    return model._adapter_state.engine.forward.only(given)


@torch.no_grad()
def _seen(model: AdaptedModule, adapter: AdapterParameters, ids: list[int]) -> Cache:
    """What the base leaves in the cache of these tokens."""
    cache = DynamicCache()  # without a config it holds every token, whatever the windows of layers
    given = {**_texts(model, adapter, ids), str(model._adapter_state.engine.forward.cache): cache}
    if not contract.uses_cache(getattr(model, "config", None)):
        given[contract.USE_CACHE] = True
    with disabled(model._adapter_state):
        in_evaluation(model, lambda: model(**given))
    return cache


def _start(adapter: AdapterParameters, at: PlannedSite, past: Any) -> torch.Tensor:
    """Make the adapter's prompt these keys and values. Everything is checked before anything is written."""
    length, *_ = at.front
    values = flat_prefix(pairs_of(past, length), length, at)
    keys = {each.role: at.key(adapter.plan.name, each) for each in at.bound.params}
    tensors = {role: adapter.tensor(key).detach() for role, key in keys.items()}
    (own,) = (each.role for each in at.bound.params if each.trained)
    kept = values.to(tensors[own])
    in_front = Evaluator(Eager(), tensors | {own: kept}, dict(at.bound.scalars))
    assert at.bound.prompt is not None
    with torch.no_grad():
        if not torch.equal(in_front.of(at.bound.prompt), kept):
            _refuse(adapter.plan.name)
        tensors[own].copy_(kept)
    return values


def _refuse(name: str) -> NoReturn:
    message = f"adapter {name!r} cannot start from keys and values: its prompt' is computed"
    fail(UsageError, "E570", message, help="a projection has no start that gives them: leave it out")


def pairs_of(past: Any, length: int) -> list[Pair]:
    """The keys and values of every layer, `[rows, heads, tokens, size]`, from the first token on.

    Raises:
        UsageError: it is no cache (E572), or what a layer has of the first `length` tokens is not all (E571).
    """
    if isinstance(past, EncoderDecoderCache):
        fail(UsageError, "E572", "the cache is one of a decoder beside an encoder, and the model has no encoder")
    if isinstance(past, Cache):
        found = _read(past)
    else:
        found = [(pair, 0) for pair in past] if isinstance(past, list | tuple) else []
    if not found or not all(_is_pair(pair) for pair, _ in found):
        message = f"a value of type {type(past).__name__} does not hold keys and values of layers"
        help = "pass the past_key_values of an output, or a pair of tensors [1, heads, tokens, size] for each layer"
        fail(UsageError, "E572", message, help=help)
    for index, ((keys, values), lost) in enumerate(found):
        tokens = min(keys.shape[2], values.shape[2])
        if lost:
            message = f"layer {index} of the cache keeps the last {tokens} of {_tokens(tokens + lost)}"
            help = "a window slid over them: pass a cache that keeps all, such as DynamicCache()"
            fail(UsageError, "E571", f"{message}, and the prefix starts from the first {length}", help=help)
        if tokens < length:
            message = f"layer {index} of the cache has {_tokens(tokens)}, and the prefix {length}"
            fail(UsageError, "E571", message, help="give a longer text, or make the prefix shorter")
    return [pair for pair, _ in found]


def flat_prefix(pairs: list[Pair], length: int, at: PlannedSite) -> torch.Tensor:
    """The first keys and values as a prefix holds them, `[length, 2 * layers * heads * size]`. Raises UsageError."""
    site = at.site
    size = site.in_features // site.heads
    if len(pairs) != site.layers:
        fail(UsageError, "E572", f"the cache has {len(pairs)} layers, and the model {site.layers}")
    for index, pair in enumerate(pairs):
        for each in pair:
            rows, heads, _, own = each.shape
            if rows != 1:
                message = f"the cache is one of {rows} texts"
                fail(UsageError, "E572", message, help="start from one: a prefix is the same for every row")
            if (heads, own) != (site.heads, size):
                message = f"layer {index} of the cache has {heads} heads of {own} numbers"
                fail(UsageError, "E572", f"{message}, and the prefix {site.heads} of {size}")
    slots = [each[0, :, :length].to(pairs[0][0]) for pair in pairs for each in pair]
    return torch.stack(slots).permute(2, 0, 1, 3).reshape(length, -1)


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


def _in_cache(adapter: AdapterParameters) -> list[PlannedSite]:
    return [at for at in adapter.plan.sites if at.site.kind == KIND]


def _read(cache: Cache) -> list[tuple[Pair, int]]:
    """Each layer's keys and values, and how many tokens are no longer among them."""
    layers = [each for each in cache.layers if each.is_initialized]
    found: list[tuple[Pair, int]] = []
    for layer in layers:
        cache_layers.check(layer)
    for layer, seen in zip(layers, cache_layers.lengths(layers), strict=True):
        keys, values = cache_layers.read(layer, seen)
        lost = cache_layers.lost(layer, seen)
        found.append(((keys[:, :, lost:], values[:, :, lost:]), lost))
    return found


def _is_pair(pair: Any) -> bool:
    return len(pair) == 2 and all(isinstance(each, torch.Tensor) and each.dim() == 4 for each in pair)
