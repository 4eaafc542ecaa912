"""Token embeddings beside an adapter in a file: when those of the base are saved with it, and what base that makes."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.foreign import peft as fields
from peftc.passes.foreign import transformers as contract
from peftc.passes.plan.plan import AdapterPlan, ParamKey
from peftc.passes.plan.vocabulary import vocabulary
from peftc.runtime.adapted.adapted_module import AdaptedModule
from peftc.runtime.adapted.base_weights import BaseWeights
from peftc.runtime.base.overlay import Overlay
from peftc.runtime.peft_format.manifest import fingerprint
from peftc.runtime.peft_format.own_embeddings import embedding_modules
from peftc.runtime.peft_format.wrapped_names import base_key

SaveEmbeddings = bool | Literal["auto"]


def read_values(plan: AdapterPlan, values: Mapping[ParamKey, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter read in place of the base's tensors, by every name in the model, in the base's types."""
    found = {}
    for copy in plan.copies:
        for tensor, _, _ in copy.tensors if copy.read else ():
            for name in copy.names(tensor):
                found[name] = values[ParamKey(plan.name, copy.module, tensor)].to(base[name])
    return found


def base_of(base: BaseWeights, own: Mapping[str, Tensor]) -> str:
    """The fingerprint of the base with these tensors, by names, in the place of its own."""
    held = base.own()
    return fingerprint(Overlay(held.model, {**held.replaced, **own}).identity())


def checked(save: object) -> SaveEmbeddings:
    """Whether embeddings are to be saved. Raises UsageError for what says neither."""
    if save is True or save is False or save == "auto":
        return save
    help = "it is True, False or 'auto': where the adapter is on them, or the vocabulary has grown"
    fail(UsageError, "E526", f"save_embedding_layers is {save!r}", help=help)


def embeddings_to_save(
    model: AdaptedModule, plan: AdapterPlan, save: SaveEmbeddings, state_dict: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The base's tensors that are saved beside an adapter, by their names in the model.

    Those of the modules that embed tokens and give logits, but what is stored packed, what the adapter trains as a
    whole, and what lies on no device. With "auto" they are saved where PEFT saves them: of modules by the names that it
    knows those that the adapter is on, unless it trains tokens; and all where the base has other tokens than the config
    that it was loaded with, unless the adapter has rows for each.
    """
    if save is False:
        return {}
    state = model._adapter_state
    ground = state.engine.backend.survey()
    adapted = {at.site.module for at in plan.sites if at.bound.prompt is None}
    known = {each for each in adapted if each.rpartition(".")[2] in fields.EMBEDDINGS}
    grown = _has_grown(model, plan, told=save == "auto")
    modules = embedding_modules(ground)
    if save is True and not modules:
        warnings.warn(
            f"{type(model).__name__} does not say which of its modules embed tokens: none is saved", stacklevel=4
        )
    if not grown and save == "auto" and (not known or plan.rows):
        return {}
    if not grown and known:
        modules = tuple(each for each in modules if each in adapted)
    taken = {name for copy in plan.copies for tensor, _, _ in copy.tensors for name in copy.names(tensor)}
    base = state.base.own()
    given = {} if state.displaced or state_dict is None else state_dict
    found = {}
    for name, tensor in base.tensors():
        inside = any(name.startswith(f"{each}.") for each in modules)
        if inside and name not in taken and not any(name.startswith(f"{each}.") for each in base.packed):
            value = given.get(name, tensor)
            if value.is_meta and save is True:
                help = "load it into memory, or leave save_embedding_layers out"
                fail(UsageError, "E527", f"{name} is not in memory, so it cannot be saved", help=help)
            if not value.is_meta:
                found[name] = value
    return found


def keyed(plan: AdapterPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base's tensors by the keys of a file."""
    return {base_key(plan, name): tensor for name, tensor in tensors.items()}


def _has_grown(model: AdaptedModule, plan: AdapterPlan, *, told: bool) -> bool:
    """Whether the base has other tokens than where it was loaded from, and the adapter not each of their rows."""
    facts, config = model._adapter_state.base.facts, getattr(model, "config", None)
    ground = model._adapter_state.engine.backend.survey()
    now = vocabulary(ground)
    if not facts.base_name or now is None or config is None:
        return False
    before = _size_of(config, facts.base_name, facts.base_revision)
    if before is None:
        if told:
            message = f"there is no config of '{facts.base_name}' here to tell whether the vocabulary has grown"
            warnings.warn(f"{message}: embeddings are saved only with save_embedding_layers=True", stacklevel=5)
        return False
    size = contract.vocabulary_size(config)
    new = set(range(before, size))
    rows = {module: set(each.ids) for each in plan.rows for module in each.modules}
    every = [each for each in (ground.embedding, now.head) if each]
    return size != before and not (new and all(new <= rows.get(each, set()) for each in every))


def _size_of(config: Any, name: str, revision: str | None) -> int | None:
    """How many tokens the config of this name has that is on this machine; None where none is."""
    load, here = getattr(type(config), "from_pretrained", None), Path(name)
    if load is None or (here.is_dir() and not (here / "config.json").is_file()):
        return None
    try:
        return contract.vocabulary_size(load(name, revision=revision, local_files_only=True))
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
    ):  # what transformers raises of files that are not there, or damaged
        return None
