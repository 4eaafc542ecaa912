"""The one call of a graph that goes back to the caller's Python: a cache takes what is new, and gives all it has."""

from typing import Any

import torch
from torch.fx.node import has_side_effect


@has_side_effect
def update_cache(cache: Any, keys: torch.Tensor, values: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `[rows, heads, tokens, size]` to what a layer's cache has, and return all of it as attention is to see it.

    How a cache holds keys and values is its own affair: no graph knows.
    """
    found: tuple[torch.Tensor, torch.Tensor] = cache.update(keys, values, index)
    return found
