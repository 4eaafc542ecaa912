"""What one layer of a transformers cache holds, whatever its kind: read in full, written by what is new.

| layer | held as |
|---|---|
| dynamic | tensors that grow |
| dynamic, sliding | what the window will need |
| static | a buffer for all tokens, and a counter |
| static, sliding | a buffer as long as the window, rolled when full |
| quantized | quantized tensors and a residual that is not |
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    BaseQuantizedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from peftc.grammar.diagnostics import ModelError, fail

Pair = tuple[torch.Tensor, torch.Tensor]
_EXACT = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


def check(layer: Any) -> None:
    """Raises ModelError for a layer that holds more than keys and values (a linear attention's state, an index)."""
    if not is_known(layer):
        fail(
            ModelError,
            "E410",
            f"a cache layer of kind {type(layer).__name__} is not supported",
            help="a graph keeps keys and values only: use a dynamic, static or quantized cache of attention layers, "
            "or call with use_cache=False",
        )


def is_known(layer: Any) -> bool:
    """Whether a layer holds keys and values and nothing else, and looks at nothing else when it is updated."""
    return type(layer) in _EXACT or isinstance(layer, BaseQuantizedLayer)


def lengths(layers: Sequence[Any]) -> list[int]:
    """How many tokens each layer has seen. Static layers count on their device, which is asked once for all."""
    counters = [each.cumulative_length for each in layers if _counts_on_device(each)]
    counted: list[int] = _counted(counters) if counters else []
    return [counted.pop(0) if _counts_on_device(each) else int(each.get_seq_length()) for each in layers]


def read(layer: Any, seen: int) -> Pair:
    """Keys and values of all `seen` tokens; zeros where a window left them behind, which the graph's mask hides."""
    if isinstance(layer, BaseQuantizedLayer):
        return _dequantized(layer)
    keys, values = layer.keys, layer.values
    if isinstance(layer, StaticLayer):
        held = min(seen, layer.max_cache_len)
        keys, values = keys[:, :, :held], values[:, :, :held]
    return _padded(keys, seen), _padded(values, seen)


def lost(layer: Any, seen: int) -> int:
    """How many of the `seen` tokens, the first ones, a window has left behind."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        return seen - int(layer.keys.shape[2])
    return max(0, seen - layer.max_cache_len) if isinstance(layer, StaticSlidingWindowLayer) else 0


def capacity(layer: Any, window: int | None) -> int | None:
    """How many tokens fit, if there is a limit: a buffer as long as the window has none."""
    if not isinstance(layer, StaticLayer):
        return None
    length: int = layer.max_cache_len
    return None if window is not None and length >= window else length


def write(cache: Any, index: int, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
    """Add to a layer what comes after the `seen` tokens it has. Kinds that grow take the graph's tensors as they are,
    the others update themselves, with what keeps their counters, scales and devices right.
    """
    layer = cache.layers[index]
    if cache.offloading or not isinstance(layer, DynamicLayer) or isinstance(layer, BaseQuantizedLayer):
        cache.update(keys[:, :, seen:], values[:, :, seen:], index)
        return
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    fill(layer, keys, values)


def fill(layer: DynamicLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Make these, of full length, all that a layer that grows has seen."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = keys.shape[2]
        # As transformers' own update: a window of w tokens needs w - 1 from the past.
        if not layer.record_past:
            keys, values = keys[:, :, -layer.sliding_window + 1 :], values[:, :, -layer.sliding_window + 1 :]
    layer.keys, layer.values = keys, values


@torch.compiler.disable(  # type: ignore[no-untyped-call,untyped-decorator]
    reason="how full a static cache is decides sizes in an adapted model: leave fullgraph off"
)
def _counted(counters: list[torch.Tensor]) -> list[int]:
    return torch.stack(counters).tolist()


def _counts_on_device(layer: Any) -> bool:
    return type(layer) is StaticLayer and layer.is_initialized


def _padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    rows, heads, held, size = tensor.shape
    if held >= length:
        return tensor
    return torch.cat([tensor.new_zeros(rows, heads, length - held, size), tensor], dim=2)


def _dequantized(layer: Any) -> Pair:
    keys, values = layer._dequantize(layer._quantized_keys), layer._dequantize(layer._quantized_values)
    pending = getattr(layer, "_pending_beam_idx", None)
    if pending is not None:  # beam search reordered the residual, and leaves the rest to the next update
        keys, values = (each.index_select(0, pending.to(each.device)) for each in (keys, values))
    if layer.keys.numel():
        keys, values = torch.cat([keys, layer.keys], dim=2), torch.cat([values, layer.values], dim=2)
    return keys, values
