"""transformers' key-value caches as flat lists of tensors.

A graph takes, per layer, all keys and values seen so far and returns them with the new ones appended. How a cache holds
them (growing, in a buffer, quantized, of a window only what it will need) is its layers' affair, and no graph knows:
see `peftc.runtime.execution.cache_layers`. So caches of transformers' own making go in, and what comes out continues in
transformers as well.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from peftc.grammar.diagnostics import ModelError, fail
from peftc.runtime.execution import cache_layers


@dataclass(frozen=True)
class Layer:
    """One layer's cache: `[batch, heads, length, size]` for keys and values."""

    heads: int
    key_size: int
    value_size: int
    window: int | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Layout:
    """A model's cache. `cross` are the layers over the encoder's output, empty for a decoder-only model.

    `filled` says whether the graph reads the cross layers (they were computed in an earlier call) or makes them.
    """

    own: tuple[Layer, ...]
    cross: tuple[Layer, ...] = ()
    filled: bool = False

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the cache is an EncoderDecoderCache."""
        return bool(self.cross)


def kind_of(cache: Cache) -> tuple[str, bool]:
    """What of a cache decides which graph fits: decoder or encoder-decoder, and whether its cross layers are filled.

    Raises ModelError for a kind of layer that no graph can take.
    """
    if not isinstance(cache, EncoderDecoderCache):
        _check(cache)
        return ("decoder", False)
    own, cross = cache.self_attention_cache, cache.cross_attention_cache
    _check(own)
    _check(cross)
    return ("encoder-decoder", bool(cross.layers) and bool(cache.is_updated.get(0, False)))


def cache_in(output: Any) -> Cache | None:
    """The cache that a model returned, among whatever else; None where there is none. It is known by its type."""
    if isinstance(output, dict):
        output = tuple(output.values())
    values = output if isinstance(output, tuple | list) else (output,)
    return next((value for value in values if isinstance(value, Cache)), None)


def layout_of(cache: Cache, filled: bool) -> Layout:
    """The layout of an initialised cache. Raises ModelError for a kind of layer that no graph can take."""
    if isinstance(cache, EncoderDecoderCache):
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
        return Layout(tuple(map(_layer, own.layers)), tuple(map(_layer, cross.layers)), filled)
    return Layout(tuple(_layer(each) for each in cache.layers))


def read(cache: Cache, layout: Layout, rows: int, device: torch.device) -> list[torch.Tensor]:
    """Keys and values of every layer, `[rows, heads, length, size]`; of length zero where nothing was cached yet."""
    if not layout.is_encoder_decoder:
        return _read(cache, layout.own, rows, device)
    tensors = _read(cache.self_attention_cache, layout.own, rows, device)
    if layout.filled:
        tensors += _read(cache.cross_attention_cache, layout.cross, rows, device)
    return tensors


def store(cache: Cache, layout: Layout, tensors: list[torch.Tensor]) -> None:
    """Put what the graph returned back into the caller's cache."""
    if not layout.is_encoder_decoder:
        _store(cache, layout.own, tensors)
        return
    own = 2 * len(layout.own)
    _store(cache.self_attention_cache, layout.own, tensors[:own])
    if not layout.filled:
        _store(cache.cross_attention_cache, layout.cross, tensors[own:])
        for index in range(len(layout.cross)):
            cache.is_updated[index] = True


def build(layout: Layout, tensors: list[torch.Tensor], trimmed: bool = True) -> Cache:
    """A new cache that holds these keys and values (full length); untrimmed for use inside a trace.

    Where the layout has cross layers to be filled and `tensors` ends before them, they stay empty.
    """
    own = _build(layout.own, tensors, trimmed)
    if not layout.is_encoder_decoder:
        return own
    rest = tensors[2 * len(layout.own) :]
    cross = _build(layout.cross, rest, trimmed) if rest else DynamicCache()
    cache = EncoderDecoderCache(own, cross)
    cache.is_updated.update(dict.fromkeys(range(len(layout.cross)), bool(rest)))
    return cache


def tensors_of(cache: Cache, layout: Layout) -> list[torch.Tensor]:
    """Every tensor the graph returns of a cache built inside a trace."""
    if not layout.is_encoder_decoder:
        return _pairs(cache)
    own = _pairs(cache.self_attention_cache)
    return own if layout.filled else own + _pairs(cache.cross_attention_cache)


def _pairs(cache: Cache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _check(cache: Cache) -> None:
    if type(cache).get_query_offset is not Cache.get_query_offset:
        fail(
            ModelError,
            "E410",
            f"a cache of kind {type(cache).__name__} is not supported",
            help="its queries are not where its keys end: use a DynamicCache, or call with use_cache=False",
        )
    for layer in cache.layers:
        cache_layers.check(layer)


def _layer(layer: Any) -> Layer:
    cache_layers.check(layer)
    window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
    keys, values = layer.keys, layer.values
    return Layer(int(keys.shape[1]), int(keys.shape[3]), int(values.shape[3]), window, keys.dtype)


def _read(cache: Any, layers: tuple[Layer, ...], rows: int, device: torch.device) -> list[torch.Tensor]:
    if cache.offloading and device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(cache.prefetch_stream)
    tensors: list[torch.Tensor] = []
    seen = _seen(cache, len(layers))
    for index, expected in enumerate(layers):
        if seen[index]:
            tensors += [each.to(device) for each in cache_layers.read(cache.layers[index], seen[index])]
            continue
        for size in (expected.key_size, expected.value_size):
            tensors.append(torch.empty(rows, expected.heads, 0, size, dtype=expected.dtype, device=device))
    return tensors


def _store(cache: Any, layers: tuple[Layer, ...], tensors: list[torch.Tensor]) -> None:
    seen = _seen(cache, len(layers))
    for index, each in enumerate(layers):
        if index < len(cache.layers):
            _check_capacity(cache.layers[index], each, tensors[2 * index].shape[2])
    for index in range(len(layers)):
        if index >= len(cache.layers):
            cache.layers.append(cache.layer_class_to_replicate())
        cache_layers.write(cache, index, tensors[2 * index], tensors[2 * index + 1], seen[index])


def _seen(cache: Any, count: int) -> list[int]:
    """How many tokens each of the model's layers has seen; none where the cache has no layer yet."""
    seen = cache_layers.lengths(cache.layers[:count])
    return seen + [0] * (count - len(seen))


def _check_capacity(layer: Any, expected: Layer, length: int) -> None:
    capacity = cache_layers.capacity(layer, expected.window)
    if capacity is not None and length > capacity:
        fail(
            ModelError,
            "E412",
            f"the static cache holds {capacity} tokens, and there are {length} now",
            help="make it with a larger max_cache_len; what it held before this call is still there",
        )


def _build(layers: tuple[Layer, ...], tensors: list[torch.Tensor], trimmed: bool) -> DynamicCache:
    cache = DynamicCache()
    for index, each in enumerate(layers):
        layer = DynamicLayer() if each.window is None else DynamicSlidingWindowLayer(each.window)
        keys, values = tensors[2 * index], tensors[2 * index + 1]
        layer.lazy_initialization(keys, values)
        if trimmed:
            cache_layers.fill(layer, keys, values)
        else:
            layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache
