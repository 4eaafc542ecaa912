"""PEFT's functions, over adapted models."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftc.compiler.api import AdaptedModel, apply
from peftc.grammar.diagnostics import ArgumentTypeError, CheckpointError, UsageError, fail
from peftc.passes.foreign import transformers as contract
from peftc.peft.models import PeftModel, as_peft
from peftc.runtime.base.share import share
from peftc.runtime.model.described import described
from peftc.runtime.model.state_dicts import IncompatibleKeys, checked
from peftc.runtime.model.status import TunerLayerStatus, TunerModelStatus
from peftc.runtime.peft_config.config_object import config_object
from peftc.runtime.peft_format.adapter_files import locate, read_adapter


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    **options: Any,
) -> PeftModel:
    """The model with a fresh adapter, as PEFT's function of this name. `model` itself is not changed.

    `mixed` changes nothing: adapters of several methods are always welcome. `options` are those of `compiler.apply`,
    such as `regions` and `calibration`. Raises as `compiler.apply`.
    """
    adapted = apply(
        model,
        {adapter_name: peft_config},
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
        **options,
    )
    facts = adapted._adapter_state.base.facts
    facts.base_revision = facts.base_revision if revision is None else revision
    return as_peft(adapted)


def inject_adapter_in_model(
    peft_config: Any,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> AdaptedModel:
    """The model with a fresh adapter, of the model's own class. Unlike PEFT's function, `model` itself is not changed.

    With a `state_dict` it is of the modules that this has tensors of, and a warning says which others the config names;
    its values are not read, as in PEFT: `set_peft_model_state_dict` puts them in. Raises as `compiler.apply`, and
    CheckpointError where the config names parameters beside a `state_dict`.
    """
    found = described({adapter_name: peft_config})
    meant = found if state_dict is None else found.of_keys(state_dict)
    adapted = apply(model, meant, low_cpu_mem_usage=low_cpu_mem_usage)
    if state_dict is not None:
        found.warn_of_others(adapted.adapter_plan(adapter_name), adapted._adapter_state.engine.backend.survey())
    return adapted


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A model over the same weights, frozen, and with gradient checkpointing, to be adapted next.

    Unlike PEFT's function it returns another object, and leaves `model` as it is. What is not quantized is held in
    float32 by `get_peft_model`, unless it is told not to.
    """
    prepared: Any = share(model, requires_grad=False)
    if use_gradient_checkpointing and hasattr(prepared, "gradient_checkpointing_enable"):
        prepared.gradient_checkpointing_enable(dict(gradient_checkpointing_kwargs or {contract.REENTRANT: False}))
    return prepared


def hotswap_adapter(
    model: AdaptedModel,
    model_name_or_path: str | PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **options: Any,
) -> None:
    """Put a saved adapter in the place of one that is there, as `load_adapter(..., hotswap=True)`.

    Unlike PEFT's function, of any method.
    """
    if "is_trainable" in options:
        help = "leave it out; set_requires_grad changes it"
        fail(ArgumentTypeError, "E589", "what is swapped in is trained as what it replaces was", help=help)
    checked(model).load_adapter(model_name_or_path, adapter_name, hotswap=True, **options)


def get_layer_status(model: Any) -> list[TunerLayerStatus]:
    """The state of every adapted module: see `AdaptedModel.get_layer_status`."""
    return checked(model).get_layer_status()


def get_model_status(model: Any) -> TunerModelStatus:
    """The state of the model: see `AdaptedModel.get_model_status`."""
    return checked(model).get_model_status()


def get_base_model_state_dict(model: Any) -> dict[str, torch.Tensor]:
    """The base's tensors by its own names, without adapters' and without what is merged into them."""
    found: dict[str, torch.Tensor] = checked(model).unload().state_dict()
    return found


def set_base_model_state_dict(
    model: Any, state_dict: Mapping[str, torch.Tensor], strict: bool = True
) -> IncompatibleKeys:
    """Give the base of an adapted model other values, as PEFT's function of this name; keys are the base's own.

    The user's model keeps its values: this one gets tensors of its own for what differs. Returns missing and unexpected
    keys. Raises CheckpointError, and changes nothing, for such if `strict`, and for tensors of other sizes; UsageError
    while adapters are merged, which have their place in the base's tensors.
    """
    if checked(model)._adapter_state.base.merged_adapters:
        message = "adapters are merged into the base's tensors"
        fail(UsageError, "E593", message, help="call unmerge_adapter first")
    known = model.unload().state_dict()
    told = IncompatibleKeys(
        [each for each in known if each not in state_dict], [each for each in state_dict if each not in known]
    )
    wrong = [f"unexpected key {key!r}" for key in told.unexpected_keys]
    wrong += [f"missing key {key!r}" for key in told.missing_keys]
    if strict and wrong:
        fail(CheckpointError, "E341", "\n".join(wrong[:8]), help="strict=False leaves these", where="the state_dict")
    sizes = [
        f"'{key}' has shape {list(value.shape)}, expected {list(known[key].shape)}"
        for key, value in state_dict.items()
        if key in known and value.shape != known[key].shape
    ]
    if sizes:
        fail(CheckpointError, "E342", "\n".join(sizes[:8]), where="the state_dict")
    model.load_state_dict({key: value for key, value in state_dict.items() if key in known}, strict=False)
    return told


def get_peft_config(config_dict: Mapping[str, Any]) -> Any:
    """The configuration of these fields, among them `peft_type`."""
    return config_object(config_dict)


def load_peft_weights(
    model_id: str | PathLike[str], device: str | None = None, *, allow_pickle: bool = False, **options: Any
) -> dict[str, torch.Tensor]:
    """The tensors of a saved adapter, by PEFT's keys. Raises CheckpointError."""
    directory = locate(model_id if isinstance(model_id, str) else Path(model_id), **options)
    tensors = read_adapter(directory, allow_pickle=allow_pickle)[1]
    return {key: value if device is None else value.to(device) for key, value in tensors.items()}


def initialize_kv_prefix_from_text(model: Any, tokenizer: Any, **options: Any) -> torch.Tensor:
    """Start a prefix as the keys and values of a text: see `AdaptedModel.initialize_kv_prefix_from_text`."""
    return checked(model).initialize_kv_prefix_from_text(tokenizer, **options)


def initialize_kv_prefix_from_past_key_values(model: Any, **options: Any) -> torch.Tensor:
    """Start a prefix as keys and values: see `AdaptedModel.initialize_kv_prefix_from_past_key_values`."""
    return checked(model).initialize_kv_prefix_from_past_key_values(**options)
