"""PEFT's functions that take an adapter's tensors out of a model, and put others in."""

from collections.abc import Mapping
from typing import Any

import torch

from peftc.grammar.diagnostics import ArgumentTypeError, fail
from peftc.runtime.model.adapted_module import AdaptedModule
from peftc.runtime.model.adapter_values import IncompatibleKeys, set_adapter_state
from peftc.runtime.model.saving import adapter_tensors


def get_peft_model_state_dict(
    model: Any, state_dict: Mapping[str, torch.Tensor] | None = None, adapter_name: str = "default"
) -> dict[str, torch.Tensor]:
    """An adapter's tensors under the keys that PEFT saves them by, as PEFT's function of this name.

    They are the live ones, or those of a `state_dict` of the model. Raises UsageError for an unknown adapter,
    ArgumentTypeError for a model that peftc has not adapted.
    """
    return adapter_tensors(_adapted(model), adapter_name, state_dict)


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> IncompatibleKeys:
    """Give an adapter other values, in place, as PEFT's function of this name.

    Keys are those of `get_peft_model_state_dict`. What is not given stays as it is. `low_cpu_mem_usage` changes
    nothing: no tensor is made. Returns missing and unexpected keys. Raises CheckpointError, and changes nothing, where
    sizes differ, unless those are ignored; UsageError for an unknown adapter, or one that is merged.
    """
    return set_adapter_state(
        _adapted(model), adapter_name, peft_model_state_dict, ignore_mismatched_sizes=ignore_mismatched_sizes
    )


def _adapted(model: Any) -> AdaptedModule:
    if not isinstance(model, AdaptedModule):
        message = f"a {type(model).__name__} is not a model that peftc has adapted"
        fail(ArgumentTypeError, "E595", message, help="adapt it with apply or load, or use peft's own function")
    return model
