"""Attention masks of a call with a cache, as wide as the keys a graph sees.

transformers makes masks for a cache as it is held: as wide as a static buffer, or from where a sliding window begins. A
graph sees all tokens from the first to the last new one, and so must its masks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache

from peftc.passes.foreign.transformers import WINDOWED, name_of
from peftc.passes.ir.roles import Role, Stack
from peftc.runtime.execution import cache_layers


def fit(arguments: Mapping[str, Any], cache: Cache, is_encoder_decoder: bool = False) -> Mapping[str, Any]:
    """The call's arguments, its mask over the cached tokens cut or padded. Masks that fit are left as they are."""
    stack = Stack.DECODER if is_encoder_decoder else Stack.ONLY
    name = name_of(Role.MASK, stack)
    mask, new = arguments.get(name), _new_tokens(arguments, stack)
    if new is None or not len(cache):
        return arguments
    if isinstance(mask, dict):
        return {**arguments, name: {kind: _fit(each, cache, new, kind in WINDOWED) for kind, each in mask.items()}}
    if not isinstance(mask, torch.Tensor) or (mask.dim() == 2 and not cache.is_compileable):
        return arguments
    return {**arguments, name: _fit(mask, cache, new, all(cache.is_sliding))}


def _new_tokens(arguments: Mapping[str, Any], stack: Stack) -> int | None:
    for role in (Role.TOKENS, Role.EMBEDDINGS):
        found = arguments.get(name_of(role, stack))
        if isinstance(found, torch.Tensor) and found.dim() > 1:
            return found.shape[1]
    return None


def _fit(mask: Any, cache: Cache, new: int, windowed: bool) -> Any:
    if not isinstance(mask, torch.Tensor):
        return mask
    if mask.dim() == 2:  # as wide as the buffer: tokens to come are in it
        return mask[:, : _seen(cache) + new] if mask.shape[1] >= cache.get_max_length() else mask
    layer = cache.is_sliding.index(windowed) if windowed in cache.is_sliding else 0
    width, start = cache.get_mask_sizes(new, layer)
    if mask.dim() != 4 or mask.shape[3] != width:
        return mask
    whole = _seen(cache) + new
    if width == whole:
        return mask
    hidden = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
    return torch.nn.functional.pad(mask, (start, 0), value=hidden)[..., :whole]


def _seen(cache: Cache) -> int:
    layers = getattr(cache, "self_attention_cache", cache).layers
    return cache_layers.lengths(layers[:1])[0]
