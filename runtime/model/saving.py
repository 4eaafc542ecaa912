"""Saving adapters of a model in the PEFT format."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.foreign import peft as fields
from peftc.passes.foreign import transformers as contract
from peftc.passes.foreign.peft_classes import is_installed
from peftc.passes.plan.plan import AdapterPlan, ParamKey
from peftc.runtime.adapted.adapted_module import AdaptedModule
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.base.overlay import BANK, is_adapters
from peftc.runtime.model.embeddings import SaveEmbeddings, base_of, checked, embeddings_to_save, keyed, read_values
from peftc.runtime.peft_config.peft_config import write_config
from peftc.runtime.peft_config.peft_rule import mask_field
from peftc.runtime.peft_config.spec_config import spec_text
from peftc.runtime.peft_format.adapter_files import adapter_directory, write_adapter, write_files
from peftc.runtime.peft_format.checkpoint import Entry, entries, kept_masks
from peftc.runtime.peft_format.manifest import AdapterFacts, Manifest, spec_digest, write_manifest
from peftc.runtime.peft_format.saved_value import settled_value
from peftc.runtime.routing.routed_adapters import is_saved_route, save_route

# Where PEFT is not installed, a Trainer resumes only from this file, and saves nowhere else under such names.
TRAINER_STATE = "model.safetensors"
TRAINING = "peftc_training.safetensors"
"""In a Trainer's checkpoint, all of an adapter that keeps a budget: what was dropped, and what it measured."""

_TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")

StateDict = Mapping[str, torch.Tensor]


def save_adapters(
    model: AdaptedModule,
    directory: str | PathLike[str],
    names: Sequence[str],
    state_dict: StateDict | None,
    embeddings: SaveEmbeddings = "auto",
    *,
    safe: bool = True,
) -> None:
    """Write adapters into a directory, or subdirectories of it: see `AdaptedModel.save_pretrained`."""
    state = model._adapter_state
    adapters = [state.adapter(name) for name in names]
    root = Path(directory)
    if root.is_file():
        fail(UsageError, "E541", f"{root} is a file", help="give a directory")
    resumable = bool(_TRAINER_CHECKPOINT.fullmatch(root.name))
    for adapter in adapters:
        place = adapter_directory(root, saved_name(model, adapter.plan.name))
        _save(model, adapter, place, state_dict, checked(embeddings), safe)
        if resumable and adapter.allocator is not None:
            whole = {key: value.detach().cpu().contiguous() for key, value in adapter.state_dict().items()}
            write_files(place, {TRAINING: partial(save_file, whole)})
    save_route(model, root, {name: saved_name(model, name) for name in names}, state_dict, safe=safe)
    if resumable and not is_installed():
        given = model.state_dict() if state_dict is None else state_dict
        own = {key: value.detach().cpu().contiguous() for key, value in given.items() if is_adapters(key)}
        write_files(root, {TRAINER_STATE: lambda path: save_file(own, path, metadata={"format": "pt"})})


def saved_name(model: AdaptedModule, name: str) -> str:
    """The name that an adapter is saved by, which says where: a lone one may be saved as the one called `default`."""
    state = model._adapter_state
    lone = model.lone_is_default and len(state.names()) == 1 and not is_saved_route(state)
    return "default" if lone else name


def adapter_tensors(model: AdaptedModule, name: str, state_dict: StateDict | None) -> dict[str, torch.Tensor]:
    """An adapter's tensors under the keys PEFT saves them by; from a state dict of the model, if one is given."""
    adapter = model._adapter_state.adapter(name)
    saved = {key: entry for key, entry in entries(adapter.plan).items() if entry.written}
    found = {key: _value(model, adapter, entry, state_dict) for key, entry in saved.items()}
    if adapter.allocator is None or not mask_field(adapter.plan.spec.rule):
        return found
    return {key: adapter.allocator.pruned(saved[key].key, value) for key, value in found.items()}


def versions() -> dict[str, str]:
    """The versions a checkpoint was written with."""
    found = {}
    for package in ("peftc", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _value(
    model: AdaptedModule, adapter: AdapterParameters, entry: Entry, state_dict: StateDict | None
) -> torch.Tensor:
    if entry.computed:
        at, name = entry.planned, adapter.plan.name
        assert at is not None
        tensors = {each.role: _held(adapter, at.key(name, each), state_dict) for each in at.bound.params}
        return settled_value(at, tensors, model._adapter_state.base.own().value)
    value = _held(adapter, entry.key, state_dict)
    return value if value.shape == entry.shape else value.detach().reshape(entry.shape)


def _save(
    model: AdaptedModule,
    adapter: AdapterParameters,
    directory: Path,
    state_dict: StateDict | None,
    save: SaveEmbeddings,
    safe: bool,
) -> None:
    plan, base, config = adapter.plan, model._adapter_state.base, adapter_config(model, adapter)
    tensors = adapter_tensors(model, plan.name, state_dict)
    own = read_values(plan, dict(adapter.items()), dict(base.own().tensors()))
    beside = embeddings_to_save(model, plan, save, state_dict)
    if save is False:
        tensors = {key: each for key, each in tensors.items() if key not in keyed(plan, own)}
    tensors = {**keyed(plan, beside), **tensors}
    spec = spec_text(plan.spec)
    manifest = Manifest(
        base_id=base.facts.base_name,
        base_revision=base.facts.base_revision,
        base_class=type(model).__name__,
        fingerprint=base_of(base, own) if own or beside else base.fingerprint(),
        spec=spec,
        spec_sha256=spec_digest(spec),
        versions=versions(),
        quantized=base.own().quantization(),
        regions=base.facts.regions,
        adapters={plan.name: AdapterFacts(plan.spec.rule.name, plan.parameter_count)},
    )
    write_adapter(directory, config, tensors, safe=safe)
    write_manifest(directory, manifest)


def adapter_config(model: AdaptedModule, adapter: AdapterParameters) -> dict[str, object]:
    """The fields of the adapter_config.json of an adapter. Raises CheckpointError where PEFT has no words for it."""
    plan, base = adapter.plan, model._adapter_state.base
    config = write_config(
        plan,
        module_names=[name for name, _ in model.named_modules() if name and not is_adapters(name)],
        base_model_name_or_path=base.facts.base_name,
        task_type=base.facts.tasks.get(plan.name) or base.facts.task_type or _task(model, plan),
        auto_mapping=fields.auto_mapping(_user_class(model)),
        revision=base.facts.base_revision,
    )
    field, allocator = mask_field(plan.spec.rule), adapter.allocator
    if field and allocator is not None and allocator.masks:
        config[field] = kept_masks(plan, allocator.masks)
    return config


def _task(model: AdaptedModule, plan: AdapterPlan) -> str | None:
    """The task that the model's class says, where PEFT can call it so; and one where something stands in front."""
    classes = [each.__name__ for each in _user_class(model).__mro__]
    both = contract.is_encoder_decoder(getattr(model, "config", None))
    if any(at.bound.prompt is not None for at in plan.sites):
        return fields.task_of(classes, encoder_decoder=both)
    if not hasattr(model, "config") or not contract.forward_of(_user_class(model).forward).takes(contract.TOKENS):
        return None
    bare = classes[0].endswith("Model") and getattr(model, "base_model", None) is model
    return fields.auto_task_of(classes, encoder_decoder=both, bare=bare and not classes[0].endswith("EncoderModel"))


def _user_class(model: AdaptedModule) -> type[nn.Module]:
    """The class of the model that was adapted."""
    found: type[nn.Module] = type(model)._base_class
    return found


def _held(adapter: AdapterParameters, key: ParamKey, state_dict: StateDict | None) -> torch.Tensor:
    given = (state_dict or {}).get(f"{BANK}.{adapter.plan.name}.{adapter.attribute(key)}")
    return adapter.tensor(key) if given is None else given
