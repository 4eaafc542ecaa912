"""A route and its adapters put into a model together: loaded, or made for adapters that were saved."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.foreign import peft as contract
from peftc.runtime.adapted.adapted_module import AdaptedModule
from peftc.runtime.adapted.adapter_set import ROUTE, AdapterSet
from peftc.runtime.adapted.routed_call import Routed
from peftc.runtime.base.overlay import BANK
from peftc.runtime.peft_format.adapter_files import adapter_directory, write_adapter
from peftc.runtime.peft_format.load_options import LoadOptions
from peftc.runtime.routing.classifier import ScalingClassifier
from peftc.runtime.routing.saved_route import SavedRoute, check_tensors, fill, place_of, route_config, route_tensors

Load = Callable[[str | PathLike[str], str, LoadOptions], Any]
"""Puts a saved adapter beside the others, or into the one of this name: a place, the name, how it is read."""


def put_route(
    model: AdaptedModule,
    name: str,
    saved: SavedRoute,
    options: LoadOptions,
    load: Load,
    *,
    directory: Path | None = None,
    repository: str = "",
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Load the adapters of a route, and let a classifier choose from them, with these tensors or fresh.

    A saved one is in a `directory`, or, its adapters in subfolders, in a `repository` on the Hub. Where it is there
    already the values are put into it. It becomes active with its adapters if nothing is. Raises as `load` and
    `set_route`, and leaves the model as it was.
    """
    state = model._adapter_state
    if state.routed is not None:
        classifier = _known(state.routed, name, saved)
    else:
        classifier = None
        for each in (name, *saved.adapters):
            state.check_name(each, help="choose another adapter_name" if each == name else "delete it first")
        if name in saved.adapters:
            message = f"the route and one of its adapters are both called {name!r}"
            fail(UsageError, "E511", message, help="choose another adapter_name")
    alone, trains = not state.active, options.is_trainable and saved.settings.trains_adapters
    own = replace(options, is_trainable=trains, config=None, subfolder=None, revision=None, values=None)
    if classifier is not None and tensors is not None:
        check_tensors(classifier, tensors, str(directory))
    with _as_it_was(model, saved.adapters):
        with _same_modes(model):
            for expert, said in saved.adapters.items():
                if repository:
                    load(repository, expert, replace(own, subfolder=expert, revision=options.revision))
                else:
                    load(said if directory is None else place_of(directory, expert, said), expert, own)
        made = classifier or _classifier(model, saved)
        if tensors is not None:
            fill(made, tensors, str(directory))
        made.requires_grad_(options.is_trainable)
        made.train(options.is_trainable and model.training)
        if classifier is None:
            state.set_route(made, list(saved.adapters), model._call_names, name=name, activate=alone)
    if alone:
        state.train(list(saved.adapters), trains)
    if saved.task_type and not state.base.facts.task_type:
        state.base.facts.task_type = saved.task_type


@contextmanager
def _same_modes(model: AdaptedModule) -> Iterator[None]:
    """Afterwards every module is in training or in evaluation as it was, whatever loading an adapter sets."""
    modes = [(each, each.training) for each in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _as_it_was(model: AdaptedModule, adapters: Mapping[str, str]) -> Iterator[None]:
    """On an error there are no more of these adapters than before, and they have their values."""
    state, facts = model._adapter_state, model._adapter_state.base.facts
    before, regions = state.active, state.regions
    told = {name: dict(each) if isinstance(each, dict) else each for name, each in vars(facts).items()}
    there = [state.adapter(each) for each in adapters if each in state.names()]
    values = [(each, {key: value.clone() for key, value in each.state_dict().items()}) for each in there]
    try:
        yield
    except BaseException:
        known = [each.plan.name for each in there]
        for name in [each for each in adapters if each in state.names() and each not in known]:
            state.remove(name)
        for adapter, own in values:
            adapter.load_state_dict(own)
        vars(facts).update(told)
        state.regions = regions
        state.activate(before)
        raise


def is_saved_route(state: AdapterSet) -> bool:
    """Whether the model has a route that is saved beside its adapters."""
    return state.routed is not None and isinstance(state.routed.route, ScalingClassifier)


def _known(routed: Routed, name: str, saved: SavedRoute) -> ScalingClassifier:
    """The model's classifier. Raises UsageError unless it is the one that was saved."""
    alike = routed.name == name and routed.names == tuple(saved.adapters)
    if not alike or not isinstance(routed.route, ScalingClassifier) or routed.route.settings != saved.settings:
        message = "the model has a route already, and this is not one like it"
        fail(UsageError, "E536", message, help="take the present one away first: set_route(None)")
    return routed.route


def _classifier(model: AdaptedModule, saved: SavedRoute) -> ScalingClassifier:
    state = model._adapter_state
    sites = {at.site.name for name in saved.adapters for at in state.adapter(name).plan.sites}
    like = next(each for name, each in model.named_parameters() if not name.startswith(f"{BANK}."))
    made = ScalingClassifier(saved.settings, len(saved.adapters), len(sites))
    made.sources = saved.adapters
    return made.to(like.device, like.dtype) if like.is_floating_point() else made.to(like.device)


def save_route(
    model: AdaptedModule, root: Path, names: Mapping[str, str], state_dict: Mapping[str, Tensor] | None, *, safe: bool
) -> None:
    """Write the model's route beside its adapters, if these are among those saved, `names` with their directories'."""
    routed, facts = model._adapter_state.routed, model._adapter_state.base.facts
    if routed is None or not {*routed.names} <= names.keys():
        return
    if not isinstance(routed.route, ScalingClassifier):
        message = "a route in Python is not saved with its adapters: give it to set_route again after loading"
        warnings.warn(message, stacklevel=4)
        return
    adapters = {name: str(adapter_directory(root, names[name]).resolve()) for name in routed.names}
    config = route_config(routed.route, adapters) | {
        "base_model_name_or_path": facts.base_name,
        "revision": facts.base_revision,
        "task_type": facts.task_type,
        "inference_mode": True,
        "auto_mapping": None,
        "peft_version": contract.PEFT_VERSION,
    }
    start = f"{BANK}.{ROUTE}."
    given = {key.removeprefix(start): value for key, value in (state_dict or {}).items() if key.startswith(start)}
    write_adapter(adapter_directory(root, routed.name), config, route_tensors(routed.route, given), safe=safe)
