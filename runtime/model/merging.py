"""Merging the active adapters into the weights, taking them out again, and models and checkpoints of what is merged."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.foreign import transformers as contract
from peftc.passes.plan.sites import tied_names
from peftc.runtime.adapted.adapted_module import AdaptedModule, Root
from peftc.runtime.adapted.adapter_set import AdapterSet
from peftc.runtime.adapted.base_weights import (
    STATE,
    Active,
    BaseWeights,
    Resting,
    base_view,
    bias_came_or_went,
    has_other_biases,
    has_other_packing,
    restore_requires_grad,
)
from peftc.runtime.adapted.mergeable import beside, changes_no_weight, check_mergeable, meant, mergeable
from peftc.runtime.adapted.together import Named
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.base.overlay import BANK
from peftc.runtime.base.replaced import Replaced, put
from peftc.runtime.base.share import share
from peftc.runtime.merge.drift import MergeDrift, OutputDrift
from peftc.runtime.merge.mapped import mapped_tensors
from peftc.runtime.merge.merge import merged_tensors
from peftc.runtime.merge.merged_checkpoint import can_stream, is_one_by_one, write_merged
from peftc.runtime.merge.repack import Quantized, check_packed, forget_quantization, in_types_of
from peftc.runtime.merge.rounding import in_evaluation, output_drift, tensor_drift

MAPPED = "merged.safetensors"

Changes = Mapping[str, torch.Tensor | nn.Module]


def merge(state: AdapterSet, names: Named | None, *, safe: bool, quantized: Quantized | None) -> None:
    """Put the active adapters (or those named) into the weights: see `AdaptedModel.merge_adapter`."""
    merged = state.base.merged_adapters
    if merged:
        more = _more(state, names, merged)
        if more:
            _merge_more(state, (*merged, *more), safe=safe, quantized=quantized)
        return
    active = mergeable(state, names)
    tensors = merged_tensors(state.base.model, _weighted(state, active), safe_merge=safe, quantized=quantized)
    _exchange(state, tensors, None, active)
    if not state.enabled:
        rest(state)


def _merge_more(state: AdapterSet, active: Active, *, safe: bool, quantized: Quantized | None) -> None:
    """Put these into the weights in the place of what is merged: all of it, or on an error what was."""
    _check_unchanged(state)
    enabled = state.enabled
    if not enabled:
        wake(state)
    try:
        merged = state.base.merged
        kept = _exchange(state, state.displaced, {}, ())
        try:
            tensors = merged_tensors(state.base.model, _weighted(state, active), safe_merge=safe, quantized=quantized)
            _exchange(state, tensors, None, active)
        except BaseException:
            _exchange(state, kept, None, merged)
            raise
    finally:
        if not enabled:
            rest(state)


def _more(state: AdapterSet, names: Named | None, merged: Active) -> Active:
    """The active adapters, or those named, that are not merged yet. Says what becomes of the others, as PEFT does."""
    there = ", ".join(name for name, _ in merged)
    more = beside(state, names, merged)
    if more:
        message = f"{', '.join(name for name, _ in more)} will be merged beside what is merged: {there}"
    else:
        message = f"All adapters are already merged, nothing to do: {there}"
    warnings.warn(message, stacklevel=4)
    return more


def unmerge(state: AdapterSet) -> None:
    """Give the base its own tensors back, bit for bit: see `AdaptedModel.unmerge_adapter`."""
    _check_unchanged(state)
    if state.displaced:
        _exchange(state, state.displaced, {}, ())
    state.base.resting, state.base.placed = None, {}


def _check_unchanged(state: AdapterSet) -> None:
    changed = state.base.changed_since()
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        message = f"{changed[0]}{more} was replaced or written to while adapters are merged into it"
        help = "unmerging would lose that: merge_and_unload gives a model with it, unload one without it"
        fail(UsageError, "E586", message, help=help)


def rest(state: AdapterSet) -> None:
    """Run as the base; what is merged is kept aside until `wake`."""
    displaced, merged = state.displaced, state.base.merged
    if displaced:
        tensors = _exchange(state, displaced, {}, ())
        state.base.resting = Resting(tensors, displaced, merged)
    state.enable(False)


def wake(state: AdapterSet) -> None:
    """Undo `rest`."""
    resting = state.base.resting
    if resting is not None:
        _exchange(state, resting.tensors, None, resting.merged)
        state.base.resting = None
    state.enable(True)


@contextmanager
def taken_out(state: AdapterSet) -> Iterator[None]:
    """Inside, what is merged is not."""
    displaced, merged = state.displaced, state.base.merged
    if not displaced:
        yield
        return
    tensors = _exchange(state, displaced, {}, ())
    try:
        yield
    finally:
        _exchange(state, tensors, None, merged)


@contextmanager
def disabled(state: AdapterSet) -> Iterator[None]:
    """Inside, the model runs as the base; what was enabled or merged before is so again after."""
    before = state.enabled
    with taken_out(state):
        state.enable(False)
        try:
            yield
        finally:
            state.enable(before)


def merged_model(model: AdaptedModule, names: Named | None, *, safe: bool, quantized: Quantized | None) -> nn.Module:
    """A plain model with the adapters in its weights: see `AdaptedModel.merge_and_unload`."""
    state = model._adapter_state
    tensors: Changes
    there = state.base.merged if state.displaced else ()
    more = beside(state, names, there) if there else ()
    if more:
        with taken_out(state):
            tensors = merged_tensors(model, _weighted(state, (*there, *more)), safe_merge=safe, quantized=quantized)
    elif there:
        merged = [now for _, now in state.base.merged_names()]
        tensors = _owned({name: _there(model, name) for name in reversed(merged)})
    else:
        active = meant(state, names)
        check_mergeable(state, active)
        tensors = merged_tensors(model, _weighted(state, active), safe_merge=safe, quantized=quantized)
    plain = state.base.own().copy()
    tensors = in_types_of(plain, tensors)
    ties = [names for names in set(tied_names(plain).values()) if len(names) > 1]
    replaced = reversed(put(plain, tensors).items())
    new = [name for name, before in replaced if bias_came_or_went(before, tensors[name])]
    if new:
        first = new[0].removesuffix(".bias")
        rest_of = f" (and {len(new) - 1} more)" if len(new) > 1 else ""
        message = f"merging gave {first} a bias{rest_of}"
        warnings.warn(f"{message}: a checkpoint of this model does not fit the class as it is", stacklevel=3)
    restore_requires_grad(plain, state.base.requires_grad)
    forget_quantization(plain)
    if any(len({id(_there(plain, name)) for name in names}) > 1 for names in ties):
        _untie(plain)
    return plain


def write_checkpoint(
    model: AdaptedModule, directory: Path, *, max_shard_size: int | str, safe: bool, quantized: Quantized | None
) -> None:
    """Fill an empty directory with the checkpoint of the merged model, weight by weight where that can be."""
    state = model._adapter_state
    adapters = [] if state.displaced else _weighted(state, mergeable(state, None))
    check_packed(adapters, quantized)
    plain = state.base.unloaded()
    if not isinstance(plain, PreTrainedModel):
        message = f"a {type(plain).__name__} has no checkpoint format: it is no transformers model"
        fail(UsageError, "E591", message, help="save merge_and_unload().state_dict() as you save the model")
    if adapters and can_stream(plain, adapters):
        write_merged(directory, plain, model, adapters, size=max_shard_size, safe=safe)
        return
    merged = merged_model(model, None, safe=safe, quantized=quantized)
    merged.save_pretrained(directory, max_shard_size=max_shard_size)  # type: ignore[operator]


def merged_copy(model: Root, scratch: Path, *, safe: bool, quantized: Quantized | None) -> Root:
    """The adapted model with the active adapters in its weights, where only those are active that change none.

    It is another model over the same storage, to make programs of, or the model itself if it is merged. Where that can
    be, the merged weights lie in a file in `scratch`, so that they are not all in memory: the file has to stay as long.
    Raises UsageError as `merge_adapter`, and OSError.
    """
    state = model._adapter_state
    if state.displaced:
        return model
    kept = tuple(each for each in state.active if changes_no_weight(state, each[0]))
    adapters = _weighted(state, [each for each in state.active if each not in kept])
    if is_one_by_one(model, adapters):
        return _copy_with(model, mapped_tensors(model, adapters, scratch / MAPPED, safe=safe), kept)
    if not kept:
        mergeable(state, None)
    return _copy_with(model, merged_tensors(model, adapters, safe_merge=safe, quantized=quantized), kept)


def measured_drift(
    model: AdaptedModule, args: Sequence[Any], kwargs: Mapping[str, Any], quantized: Quantized | None
) -> MergeDrift:
    """What merging would cost: see `AdaptedModel.merge_drift`."""
    state = model._adapter_state
    active = mergeable(state, None)
    if not state.enabled:
        fail(UsageError, "E521", "the adapters are disabled: there is no output of theirs to compare with")
    adapters = _weighted(state, active)
    drift = MergeDrift(tuple(name for name, _ in active), tensor_drift(model, adapters, quantized))
    if not (args or kwargs):
        return drift
    merged = _copy_with(model, merged_tensors(model, adapters, quantized=quantized), ())
    return replace(drift, outputs=_output_drift(model, merged, args, kwargs))


def _exchange(state: AdapterSet, tensors: Mapping[str, Any], displaced: Replaced | None, merged: Active) -> Replaced:
    """Put these into the weights, with which that is merged: all of it, or nothing on an error. Returns what was there.

    `displaced` None is what these displace.
    """
    base = state.base
    known = base.displaced, base.merged, base.placed
    as_traced = state.is_as_traced
    before = base.swap(tensors)
    if as_traced:
        state.watch()
    try:
        base.displaced, base.merged = before if displaced is None else displaced, merged
        if base.displaced:  # not while it rests: then it is known from before where it belongs
            base.place()
        state.activate(state.active)
    except BaseException:
        base.swap(before)
        if as_traced:
            state.watch()
        base.displaced, base.merged, base.placed = known
        state.activate(state.active)
        raise
    return before


def _copy_with(model: Root, tensors: Changes, active: Active) -> Root:
    """Another adapted model over the same storage, with these tensors and only these adapters."""
    state = model._adapter_state
    copied: Root = object.__new__(type(model))
    copied.__dict__.update(share(base_view(model), requires_grad=False).__dict__)
    before, bank = put(copied, tensors), nn.Module()
    for name, _ in active:
        bank.add_module(name, state.adapter(name))
    copied.add_module(BANK, bank)
    alike = not (has_other_biases(before, tensors) or has_other_packing(before, tensors))
    engine = state.engine.beside(copied, traces=alike)
    copied.__dict__[STATE] = AdapterSet(engine, bank, BaseWeights(copied, engine))
    copied._adapter_state.activate(active)
    return copied


@torch.no_grad()
def _output_drift(
    model: AdaptedModule, merged: AdaptedModule, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> OutputDrift:
    def outputs() -> tuple[Any, Any]:
        # A call may write to what it is given: a cache grows.
        with model._adapter_state.engine.unmerged():
            unmerged = model(*deepcopy(args), **deepcopy(kwargs))
        return unmerged, merged.eval()(*deepcopy(args), **deepcopy(kwargs))

    left, right = in_evaluation(model, outputs)
    mask = kwargs.get(contract.MASK)
    return output_drift(left, right, mask if isinstance(mask, torch.Tensor) else None)


def _weighted(state: AdapterSet, active: Sequence[tuple[str, float]]) -> list[tuple[AdapterParameters, float]]:
    return [(state.adapter(name), weight) for name, weight in active]


def _owned(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors and modules of their own over the same storage, those that are one still one. Buffers are copied."""
    made = {id(value): _own(value) for value in values.values()}
    return {name: made[id(value)] for name, value in values.items()}


def _own(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach(), requires_grad=False)
    return share(value) if isinstance(value, nn.Module) else value.clone()


def _there(model: nn.Module, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _untie(plain: nn.Module) -> None:
    config: Any = getattr(plain, "config", None)
    if getattr(config, contract.TIES, False):
        setattr(config, contract.TIES, False)
