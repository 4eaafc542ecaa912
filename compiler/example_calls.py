"""The call that example inputs stand for, and its program made beforehand."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from peftc.runtime.execution.call import Call
from peftc.runtime.model import model as runtime


def prepare(adapted: runtime.AdaptedModel, example_inputs: Sequence[Any] | Mapping[str, Any]) -> Call:
    """Trace and specialise the graph for calls like this one, now. Returns the call. Raises ModelError."""
    call = call_like(adapted, example_inputs)
    adapted._adapter_state.engine.program(call)
    return call


def call_like(adapted: runtime.AdaptedModel, example_inputs: Sequence[Any] | Mapping[str, Any]) -> Call:
    """The call that example inputs, positional or named, stand for. Traces nothing."""
    named: Callable[..., dict[str, Any]] = adapted._named
    if isinstance(example_inputs, Mapping):
        arguments = named((), example_inputs)
    elif isinstance(example_inputs, torch.Tensor):
        arguments = named((example_inputs,), {})
    else:
        arguments = named(tuple(example_inputs), {})
    return adapted._adapter_state.engine.call("", arguments)
