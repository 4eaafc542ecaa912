"""Merging adapters into the weights, measuring what that costs, and taking them out again: PEFT's methods."""

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
from peftc.passes.quantized.schemes.known import packed
from peftc.passes.quantized.schemes.packing import Packing
from peftc.runtime.base.share import share
from peftc.runtime.merge.drift import MergeDrift, OutputDrift
from peftc.runtime.merge.mapped import mapped_tensors
from peftc.runtime.merge.merge import Replaced, merged_tensors, put
from peftc.runtime.merge.merged_checkpoint import can_stream, is_one_by_one, write_merged
from peftc.runtime.merge.repack import Quantized, check_packed, forget_quantization, in_types_of
from peftc.runtime.merge.rounding import in_evaluation, output_drift, tensor_drift
from peftc.runtime.model.state import Active, AdapterState

MAPPED = "merged.safetensors"


class Merging(nn.Module):
    """The part of an adapted model that merges its adapters."""

    _adapter_state: AdapterState

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        *,
        quantized: Quantized | None = None,
    ) -> None:
        """Put the active adapters (or those named) into the weights, until `unmerge_adapter`.

        The user's own weights are not written to: merged tensors take their place in this model only. Of a quantized
        base `quantized` says what becomes of the weights: "requantize" rounds the merged ones as the base's were,
        "dequantize" makes every packed weight of the model dense. Raises UsageError if already merged, if `quantized`
        is not said and needed, or, with `safe_merge`, if a merged value is not finite.
        """
        state, active = self._adapter_state, self._mergeable(adapter_names)
        adapters = [(state.adapter(name), weight) for name, weight in active]
        state.merged = self._put(merged_tensors(self, adapters, safe_merge=safe_merge, quantized=quantized))
        state.merged_active = active
        state.activate(state.active)

    def unmerge_adapter(self) -> None:
        """Give the base its own tensors back, bit for bit."""
        state = self._adapter_state
        if not state.merged:
            warnings.warn("the model is not merged, so there is nothing to unmerge", stacklevel=2)
            return
        self._put(state.merged)
        state.merged, state.merged_active = {}, ()
        state.activate(state.active)

    def merge_drift(self, *args: Any, quantized: Quantized | None = None, **kwargs: Any) -> MergeDrift:
        """What merging the active adapters would cost, measured; the model stays as it is.

        For every tensor that merging would compute, its distance from the exact value of the formula (in float64): next
        to nothing in float32, in bfloat16 the digits it has not, of a weight that is quantized again what that rounds
        away. `quantized` is as in `merge_adapter`. Given the arguments of a call, the model is called
        with them in evaluation mode, unmerged and merged, and the outputs are compared too: their differences and,
        where there are logits, how far the distributions and the preferred tokens are apart.

        Raises UsageError if the adapters are merged already or disabled, if none is active, or if `quantized` is not
        said and needed.
        """
        state = self._adapter_state
        active = self._mergeable(None)
        if not state.enabled:
            fail(UsageError, "E521", "the adapters are disabled: there is no output of theirs to compare with")
        tensors = tensor_drift(self, [(state.adapter(name), weight) for name, weight in active], quantized)
        drift = MergeDrift(tuple(name for name, _ in active), tensors)
        return drift if not (args or kwargs) else replace(drift, outputs=self._output_drift(args, kwargs, quantized))

    def merge_and_unload(
        self,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        quantized: Quantized | None = None,
    ) -> nn.Module:
        """A plain model of the user's class with the active adapters (or those named) in its weights.

        It shares every other tensor with this model, which stays as it is. Where a tied weight was merged for one of
        its uses only, the tie is broken, and the config says so. `quantized` is as in `merge_adapter`: after
        "dequantize" the model is a dense one, for its config too.
        """
        state = self._adapter_state
        if state.merged:
            tensors = _owned({name: _there(self, name) for name in reversed(state.merged)})
        else:
            active = state.active if adapter_names is None else _subset(state, adapter_names)
            _check_mergeable(state, active)
            adapters = [(state.adapter(name), weight) for name, weight in active]
            tensors = merged_tensors(self, adapters, safe_merge=safe_merge, quantized=quantized)
        plain = self._plain(state.originals)
        tensors = in_types_of(plain, tensors)
        ties = [names for names in set(tied_names(plain).values()) if len(names) > 1]
        replaced = reversed(put(plain, tensors).items())
        new = [name for name, before in replaced if _bias_came_or_went(before, tensors[name])]
        if new:
            first = new[0].removesuffix(".bias")
            message = f"merging gave {first} a bias (and {len(new) - 1} more modules)"
            warnings.warn(f"{message}: a checkpoint of this model does not fit the class as it is", stacklevel=2)
        _restore_requires_grad(plain, state.requires_grad)
        forget_quantization(plain)
        if any(len({id(_there(plain, name)) for name in names}) > 1 for names in ties):
            _untie(plain)
        return plain

    def _write_merged(
        self, directory: Path, *, max_shard_size: int | str, safe_merge: bool, quantized: Quantized | None
    ) -> None:
        """Fill an empty directory with the checkpoint of the merged model, weight by weight where that can be."""
        state = self._adapter_state
        active = () if state.merged else self._mergeable(None)
        adapters = [(state.adapter(name), weight) for name, weight in active]
        check_packed(adapters, quantized)
        plain = self.unload()
        if not isinstance(plain, PreTrainedModel):
            message = f"a {type(plain).__name__} has no checkpoint format: it is no transformers model"
            fail(UsageError, "E591", message, help="save merge_and_unload().state_dict() as you save the model")
        if adapters and can_stream(plain, adapters):
            write_merged(directory, plain, self, adapters, size=max_shard_size, safe=safe_merge)
            return
        merged = self.merge_and_unload(safe_merge, quantized=quantized)
        merged.save_pretrained(directory, max_shard_size=max_shard_size)  # type: ignore[operator]

    def unload(self) -> nn.Module:
        """A plain model of the user's class without adapters, sharing this model's weights."""
        state = self._adapter_state
        plain = self._plain(state.originals)
        _restore_requires_grad(plain, state.requires_grad)
        return plain

    def get_base_model(self) -> nn.Module:
        """As `unload`: this model keeps its adapters."""
        return self.unload()

    def _before_dense(self) -> Replaced:
        """Packed modules, with the biases of now, in the place of those that a merge made dense.

        A trace serves both: how a weight is stored is bound later.
        """
        found: Replaced = {}
        for name, before in self._adapter_state.merged.items():
            held = packed(before) if isinstance(before, nn.Module) else None
            if held is not None and packed(self.get_submodule(name)) is None:
                made = held.scheme.share(held.module)
                made._parameters["bias"] = self.get_submodule(name)._parameters["bias"]
                found[name] = made
        return found

    @contextmanager
    def _folded(self, directory: Path, *, safe_merge: bool, quantized: Quantized | None) -> Iterator[None]:
        """Inside, the active adapters are in the weights, and only those are still active that change none.

        Where that can be, the merged weights lie in a file in `directory`, so that they are not all in memory. Raises
        UsageError as `merge_adapter`, and OSError.
        """
        state = self._adapter_state
        if state.merged:
            yield
            return
        active = state.active
        kept = tuple(each for each in active if _changes_no_weight(state, each[0]))
        adapters = [(state.adapter(name), weight) for name, weight in active if (name, weight) not in kept]
        if is_one_by_one(adapters):
            tensors: Mapping[str, Any] = mapped_tensors(self, adapters, directory / MAPPED, safe=safe_merge)
        elif kept:
            tensors = merged_tensors(self, adapters, safe_merge=safe_merge, quantized=quantized)
        else:
            self.merge_adapter(safe_merge=safe_merge, quantized=quantized)
            try:
                yield
            finally:
                self.unmerge_adapter()
            return
        before = self._put(tensors)
        try:
            state.activate(kept)
            yield
        finally:
            self._put(before)
            state.activate(active)

    @contextmanager
    def _holding(self, tensors: Replaced) -> Iterator[None]:
        """Hold these inside the context, for somebody who looks and does not call."""
        before = put(self, tensors)
        try:
            yield
        finally:
            put(self, before)

    def _put(self, tensors: Mapping[str, torch.Tensor | nn.Module | None]) -> Replaced:
        before, engine = put(self, tensors), self._adapter_state.engine
        # A trace reads a bias only where there was one when it was made.
        if any(_bias_came_or_went(old, tensors[name]) for name, old in before.items()):
            engine.reset()
        elif any(_packing(old) != _packing(tensors[name]) for name, old in before.items()):
            engine.reset(traces=False)
        else:
            engine.storage.refresh()
        return before

    def _mergeable(self, names: Sequence[str] | None) -> Active:
        """The active adapters, or those named, if they can be merged now."""
        state = self._adapter_state
        if state.merged:
            fail(UsageError, "E516", "the model is merged already", help="call unmerge_adapter first")
        active = state.active if names is None else _subset(state, names)
        if not active:
            fail(
                UsageError, "E517", "no adapter is active, so there is nothing to merge", help="call set_adapter first"
            )
        _check_mergeable(state, active)
        return active

    @torch.no_grad()
    def _output_drift(self, args: Sequence[Any], kwargs: Mapping[str, Any], quantized: Quantized | None) -> OutputDrift:
        def outputs() -> tuple[Any, Any]:
            # A call may write to what it is given: a cache grows.
            with self._adapter_state.engine.unmerged():
                unmerged = self(*deepcopy(args), **deepcopy(kwargs))
            self.merge_adapter(quantized=quantized)
            try:
                return unmerged, self(*deepcopy(args), **deepcopy(kwargs))
            finally:
                self.unmerge_adapter()

        unmerged, merged = in_evaluation(self, outputs)
        mask = kwargs.get(contract.MASK)
        return output_drift(unmerged, merged, mask if isinstance(mask, torch.Tensor) else None)

    def _plain(self, tensors: Replaced) -> nn.Module:
        raise AssertionError("AdaptedModel provides this")


def _subset(state: AdapterState, names: Sequence[str]) -> Active:
    weights = dict(state.active)
    for name in names:
        state.adapter(name)
    return tuple((name, weights.get(name, 1.0)) for name in names)


def _check_mergeable(state: AdapterState, active: Active) -> None:
    for name, _ in active:
        if _changes_no_weight(state, name):
            message = f"adapter {name!r} changes no weight: what it puts in front cannot be merged"
            help = "merge the others by name, or serve the model with its adapters"
            fail(UsageError, "E522", message, help=help)


def _changes_no_weight(state: AdapterState, name: str) -> bool:
    return any(at.bound.prompt is not None for at in state.adapter(name).plan.sites)


def _bias_came_or_went(old: Any, new: Any) -> bool:
    if isinstance(old, nn.Module) and isinstance(new, nn.Module):
        return (old._parameters.get("bias") is None) != (new._parameters.get("bias") is None)
    return (old is None) != (new is None)


def _packing(value: Any) -> Packing | None:
    held = packed(value) if isinstance(value, nn.Module) else None
    return None if held is None else held.packing


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


def _restore_requires_grad(plain: nn.Module, requires_grad: Mapping[str, bool]) -> None:
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(requires_grad.get(name, True) and parameter.is_floating_point())


def _untie(plain: nn.Module) -> None:
    config: Any = getattr(plain, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
