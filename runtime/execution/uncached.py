"""Training calls whose layers are recomputed make no cache: a layer that fills one cannot be run twice."""

import warnings
from typing import Any

import torch
from transformers.cache_utils import Cache

from peftc.passes.foreign import transformers as contract


def is_recomputing() -> bool:
    """Whether what runs now may be recomputed: not without gradients, nor where a compiler decides it."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def without_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call that makes no cache, as transformers has it too. One that is given stays.

    Warns where a cache was asked for.
    """
    if arguments.get(contract.USE_CACHE) is False or any(isinstance(each, Cache) for each in arguments.values()):
        return arguments
    if arguments.get(contract.USE_CACHE):
        message = (
            "use_cache=True is not followed while layers are recomputed (gradient checkpointing): no cache is made"
        )
        warnings.warn(message, stacklevel=5)
    return arguments | {contract.USE_CACHE: False}
