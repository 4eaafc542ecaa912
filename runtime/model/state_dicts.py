"""An adapter's tensors taken out of a model, and others put into the very parameters that optimizers hold."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from peftc.grammar.diagnostics import ArgumentTypeError, CheckpointError, UsageError, fail
from peftc.passes.foreign.checkpoints import WRAPPERS
from peftc.passes.plan.plan import ParamKey
from peftc.runtime.adapted.adapted_module import AdaptedModule
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.base.overlay import BANK
from peftc.runtime.model.saving import adapter_tensors
from peftc.runtime.peft_format.checkpoint import entries, prefixed


class IncompatibleKeys(NamedTuple):
    """What torch's `load_state_dict` returns: keys of the adapter that the tensors have not, and those too many."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def set_adapter_state(
    model: AdaptedModule,
    adapter_name: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    ignore_mismatched_sizes: bool = False,
) -> IncompatibleKeys:
    """Give an adapter the values that a file of PEFT's would have under its keys, with or without PEFT's prefix.

    What is not among the tensors stays as it is. Returns the keys that are missing, and those that are not the
    adapter's. Raises CheckpointError, and changes nothing, for a tensor of another shape, unless those are to be left
    out and counted as missing; UsageError if the adapter is merged.
    """
    adapter = model._adapter_state.adapter(adapter_name)
    expected = entries(adapter.plan)
    named = {key if key in expected else prefixed(key): key for key in tensors}
    found, wrong = dict[ParamKey, torch.Tensor](), list[str]()
    for key, entry in expected.items():
        if key not in named or entry.computed:
            continue
        tensor = tensors[named[key]]
        if tuple(tensor.shape) == entry.shape:
            found[entry.key] = tensor.reshape(entry.used)
        else:
            wrong.append(f"'{key}' has shape {list(tensor.shape)}, expected {list(entry.shape)}")
    if wrong and not ignore_mismatched_sizes:
        help = "make the adapter with the rank of these, or pass ignore_mismatched_sizes=True"
        fail(CheckpointError, "E342", "\n".join(wrong[:8]), help=help, where=f"adapter {adapter_name!r}")
    put_values(model, adapter, found)
    missing = [key for key, entry in expected.items() if not entry.optional and entry.key not in found]
    return IncompatibleKeys(missing, [key for name, key in named.items() if name not in expected])


def check_unmerged(model: AdaptedModule, adapter_name: str) -> None:
    """Raise UsageError if the adapter is merged, so that other values would not be what the model computes with."""
    if any(adapter_name == merged for merged, _ in model._adapter_state.base.merged_adapters):
        message = f"adapter {adapter_name!r} is merged: other values would not reach the weights"
        fail(UsageError, "E593", message, help="call unmerge_adapter first")


@torch.no_grad()
def put_values(model: AdaptedModule, adapter: AdapterParameters, values: Mapping[ParamKey, torch.Tensor]) -> None:
    """Write these into an adapter's tensors, in their types. Raises UsageError if the adapter is merged."""
    check_unmerged(model, adapter.plan.name)
    for key, value in values.items():
        adapter.tensor(key).copy_(value)


def get_peft_model_state_dict(
    model: Any, state_dict: Mapping[str, torch.Tensor] | None = None, adapter_name: str = "default"
) -> dict[str, torch.Tensor]:
    """An adapter's tensors under the keys that PEFT saves them by, as PEFT's function of this name.

    They are the live ones, or those of a `state_dict` of the model. Of a model that FSDP, DistributedDataParallel or
    torch.compile has wrapped they are what the wrapper's `state_dict()` says. Raises UsageError for an unknown adapter,
    ArgumentTypeError for a model that peftc has not adapted.
    """
    own = unwrapped(model)
    if own is not model:
        state_dict = dict(_of_adapters(model.state_dict() if state_dict is None else state_dict))
    return adapter_tensors(checked(own), adapter_name, state_dict)


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
        checked(unwrapped(model)), adapter_name, peft_model_state_dict, ignore_mismatched_sizes=ignore_mismatched_sizes
    )


def _of_adapters(state_dict: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The adapters' tensors by their own names, without what wrappers put before and, underlined, into these."""
    for key, value in state_dict.items():
        _, found, rest = key.partition(f"{BANK}.")
        if found:
            own = [each for each in rest.split(".") if each not in WRAPPERS or not each.startswith("_")]
            yield f"{BANK}.{'.'.join(own)}", value


def unwrapped(model: Any) -> Any:
    """The adapted model that others have wrapped; a model that holds none is itself."""
    inner = model
    while isinstance(inner, nn.Module) and not isinstance(inner, AdaptedModule):
        inner = next((inner._modules[name] for name in WRAPPERS if name in inner._modules), None)
    return model if inner is None else inner


def checked(model: Any) -> Any:
    """The model, if it is one of ours. Raises ArgumentTypeError for another."""
    if not isinstance(model, AdaptedModule):
        message = f"a {type(model).__name__} is not a model that peftc has adapted"
        fail(ArgumentTypeError, "E595", message, help="adapt it with apply or load, or use peft's own function")
    return model
