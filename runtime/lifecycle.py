"""Adding, activating, disabling, merging and removing adapters: the methods users know from PEFT and transformers."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from peftc.grammar.diagnostics import UsageError, fail
from peftc.grammar.elaborate import read_spec
from peftc.grammar.library import builtin_methods
from peftc.grammar.spec import AdapterSpec, Spec
from peftc.passes.plan import AdapterPlan
from peftc.passes.sites import tied_names
from peftc.runtime.bank import AdapterParameters, trained_keys
from peftc.runtime.base import base_tensors
from peftc.runtime.calibration import Batches, measured
from peftc.runtime.drift import MergeDrift, OutputDrift
from peftc.runtime.initial import initial
from peftc.runtime.merge import Replaced, merged_tensors, put
from peftc.runtime.peft_config import read_config
from peftc.runtime.rounding import in_evaluation, output_drift, tensor_drift
from peftc.runtime.state import Active, AdapterState
from peftc.runtime.tokens import size_of, warn_unchosen, with_ids


class Lifecycle(nn.Module):
    """The part of an adapted model that manages its adapters."""

    _adapter_state: AdapterState

    # --- adding and removing ---

    def add_adapter(
        self,
        adapter_config: Any,
        adapter_name: str | None = None,
        *,
        calibration: Batches | None = None,
        tokenizer: Any | None = None,
    ) -> None:
        """Add a fresh adapter and activate it, as transformers' `add_adapter`.

        `adapter_config` is a spec (a path, the text itself, a `Spec` or `AdapterSpec` with one adapter) or a PEFT
        config (an object with `to_dict`, or a dict). PEFT's order, the name first, is understood too. `calibration` are
        the batches that a method needs which starts from data, as in `apply`; the base runs on them. `tokenizer` is
        for tokens that a spec names by their text, for new ones, and for a method that starts from a text. Raises
        SpecError or UsageError and leaves the model as it was.
        """
        if isinstance(adapter_name, Mapping | AdapterSpec) or hasattr(adapter_name, "to_dict"):
            adapter_config, adapter_name = adapter_name, adapter_config
        spec = _one_adapter(adapter_config, adapter_name)
        if spec.name in self._adapter_state.names():
            fail(UsageError, "E511", f"there already is an adapter {spec.name!r}", help="choose another name")
        backend = self._adapter_state.engine.backend
        spec, tokens, vocabulary = with_ids(spec, tokenizer), None, backend.vocabulary() if spec.tokens else None
        if vocabulary is not None:
            spec, tokens = vocabulary.grown(spec, size_of(tokenizer))
        plan = backend.plan(spec, tokens=tokens)
        moments = measured(self.unload, (plan,), calibration)
        if vocabulary is not None and tokens is not None:
            warn_unchosen(spec, vocabulary, tokens)
            self._enlarge(tokens)
        base = dict(base_tensors(self, self._adapter_state.merged)).get
        tensors = initial(plan, base, calibration=moments, tokenizer=tokenizer)
        self._adapter_state.add(AdapterParameters(plan, tensors, trained_keys(plan)))
        self.set_adapter(spec.name)

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters. Refused while merged, as in PEFT. Unknown names are refused before anything is removed."""
        if self._adapter_state.merged:
            fail(
                UsageError,
                "E515",
                "adapters cannot be deleted while they are merged",
                help="call unmerge_adapter first",
            )
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self._adapter_state.adapter(name)
        for name in dict.fromkeys(names):
            self._adapter_state.remove(name)

    # --- activating ---

    def set_adapter(
        self, adapter_name: str | Sequence[str] | Mapping[str, float], inference_mode: bool = False
    ) -> None:
        """Activate one adapter, several in order, or several with weights; the others rest.

        Gradients reach the active ones unless `inference_mode`. A merged model is unmerged first, with a warning, as
        in PEFT. Switching between adapters of one structure rebinds tensors and does nothing else.
        """
        active = _as_active(adapter_name)
        for name, _ in active:
            self._adapter_state.adapter(name)
        if self._adapter_state.merged:
            warnings.warn("the merged adapters are unmerged before others are activated", stacklevel=2)
            self.unmerge_adapter()
        self._adapter_state.activate(active, trainable=not inference_mode)

    def active_adapters(self) -> list[str]:
        """The names of the active adapters, in order."""
        return [name for name, _ in self._adapter_state.active]

    def disable_adapters(self) -> None:
        """Run as the base model until `enable_adapters`; trained copies of modules rest too."""
        self._enable(False)

    def enable_adapters(self) -> None:
        """Undo `disable_adapters`."""
        self._enable(True)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run as the base model inside the context. What was enabled or merged before is so again after."""
        state = self._adapter_state
        before = state.enabled
        merged = self._put(state.merged) if state.merged else None
        originals, state.merged = state.merged, {}
        self._enable(False)
        try:
            yield
        finally:
            if merged is not None:
                self._put(merged)
            state.merged = originals
            self._enable(before)

    # --- merging ---

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Put the active adapters (or those named) into the weights, until `unmerge_adapter`.

        The user's own weights are not written to: merged tensors take their place in this model only. Raises
        UsageError if already merged, or, with `safe_merge`, if a merged value is not finite.
        """
        state, active = self._adapter_state, self._mergeable(adapter_names)
        adapters = [(state.adapter(name), weight) for name, weight in active]
        state.merged = self._put(merged_tensors(self, adapters, safe_merge=safe_merge))
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

    def merge_drift(self, *args: Any, **kwargs: Any) -> MergeDrift:
        """What merging the active adapters would cost, measured; the model stays as it is.

        For every tensor that merging would compute, its distance from the exact value of the formula (in float64): next
        to nothing in float32, in bfloat16 the digits it has not. Given the arguments of a call, the model is called
        with them in evaluation mode, unmerged and merged, and the outputs are compared too: their differences and,
        where there are logits, how far the distributions and the preferred tokens are apart.

        Raises UsageError if the adapters are merged already or disabled, or none is active.
        """
        state = self._adapter_state
        active = self._mergeable(None)
        if not state.enabled:
            fail(UsageError, "E521", "the adapters are disabled: there is no output of theirs to compare with")
        tensors = tensor_drift(self, [(state.adapter(name), weight) for name, weight in active])
        drift = MergeDrift(tuple(name for name, _ in active), tensors)
        return drift if not (args or kwargs) else replace(drift, outputs=self._output_drift(args, kwargs))

    def merge_and_unload(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> nn.Module:
        """A plain model of the user's class with the active adapters (or those named) in its weights.

        It shares every other tensor with this model, which stays as it is. Where a tied weight was merged for one of
        its uses only, the tie is broken, and the config says so.
        """
        state = self._adapter_state
        if state.merged:
            return self._plain()
        active = state.active if adapter_names is None else _subset(state, adapter_names)
        _check_mergeable(state, active)
        adapters = [(state.adapter(name), weight) for name, weight in active]
        tensors = merged_tensors(self, adapters, safe_merge=safe_merge)
        plain = self._plain()
        ties = [names for names in set(tied_names(plain).values()) if len(names) > 1]
        new = [name for name, before in put(plain, tensors).items() if before is None]
        if new:
            message = f"merging gave {new[0].rpartition('.')[0]} a bias (and {len(new) - 1} more modules)"
            warnings.warn(f"{message}: a checkpoint of this model does not fit the class as it is", stacklevel=2)
        _restore_requires_grad(plain, state.requires_grad)
        if any(len({id(_tensor(plain, name)) for name in names}) > 1 for names in ties):
            _untie(plain)
        return plain

    def unload(self) -> nn.Module:
        """A plain model of the user's class without adapters, sharing this model's weights."""
        state = self._adapter_state
        plain = self._plain()
        put(plain, {name: None if tensor is None else _like(tensor) for name, tensor in state.merged.items()})
        _restore_requires_grad(plain, state.requires_grad)
        return plain

    def get_base_model(self) -> nn.Module:
        """As `unload`: this model keeps its adapters."""
        return self.unload()

    # --- looking ---

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are in all, as PEFT counts."""
        trainable = sum(each.numel() for each in self.parameters() if each.requires_grad)
        return trainable, sum(each.numel() for each in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print the counts in PEFT's format."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def adapter_plan(self, adapter_name: str) -> AdapterPlan:
        """Which rule with which values an adapter puts where. Raises UsageError for an unknown name."""
        return self._adapter_state.adapter(adapter_name).plan

    def _put(self, tensors: Mapping[str, torch.Tensor | None]) -> Replaced:
        before = put(self, tensors)
        # A trace reads a bias only where there was one when it was made.
        if any((tensor is None) != (tensors[name] is None) for name, tensor in before.items()):
            self._adapter_state.engine.reset()
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
    def _output_drift(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> OutputDrift:
        def outputs() -> tuple[Any, Any]:
            # A call may write to what it is given: a cache grows.
            unmerged = self(*deepcopy(args), **deepcopy(kwargs))
            self.merge_adapter()
            try:
                return unmerged, self(*deepcopy(args), **deepcopy(kwargs))
            finally:
                self.unmerge_adapter()

        unmerged, merged = in_evaluation(self, outputs)
        mask = kwargs.get("attention_mask")
        return output_drift(unmerged, merged, mask if isinstance(mask, torch.Tensor) else None)

    def _enable(self, enabled: bool) -> None:
        self._adapter_state.enabled = enabled
        self._adapter_state.activate(self._adapter_state.active)

    def _enlarge(self, size: int, *, drawn: bool = True) -> None:
        raise AssertionError("AdaptedModel provides this")

    def _plain(self) -> nn.Module:
        raise AssertionError("AdaptedModel provides this")


def _one_adapter(config: Any, name: str | None) -> AdapterSpec:
    """The one adapter a config or spec describes, under the name asked for."""
    if isinstance(config, AdapterSpec):
        found = config
    elif isinstance(config, Mapping) or hasattr(config, "to_dict"):
        fields = config if isinstance(config, Mapping) else config.to_dict()
        # peft holds lists of names as sets, in no order.
        fields = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
        facts = read_config(fields, methods=builtin_methods(), adapter_name=name or "default", where="the PEFT config")
        found = facts.spec
    else:
        spec = config if isinstance(config, Spec) else read_spec(_text_or_path(config))
        if len(spec.adapters) != 1 and name is None:
            names = ", ".join(each.name for each in spec.adapters) or "none"
            fail(UsageError, "E518", f"the spec has not one adapter but {names}", help="name one with adapter_name")
        matching = [each for each in spec.adapters if len(spec.adapters) == 1 or each.name == name]
        if not matching:
            fail(UsageError, "E518", f"the spec has no adapter {name!r}")
        found = matching[0]
    return found if name is None or found.name == name else replace(found, name=name)


def _text_or_path(config: Any) -> str | PathLike[str]:
    if isinstance(config, str | PathLike):
        return config
    fail(
        UsageError,
        "E519",
        f"a value of type {type(config).__name__} does not describe an adapter",
        help="pass a spec (a path, its text, a Spec) or a PEFT config",
    )


def _as_active(names: str | Sequence[str] | Mapping[str, float]) -> Active:
    if isinstance(names, str):
        return ((names, 1.0),)
    if isinstance(names, Mapping):
        return tuple((name, float(weight)) for name, weight in names.items())
    return tuple((name, 1.0) for name in names)


def _subset(state: AdapterState, names: Sequence[str]) -> Active:
    weights = dict(state.active)
    for name in names:
        state.adapter(name)
    return tuple((name, weights.get(name, 1.0)) for name in names)


def _check_mergeable(state: AdapterState, active: Active) -> None:
    for name, _ in active:
        for at in state.adapter(name).plan.sites:
            if at.bound.prompt is not None:
                message = f"adapter {name!r} changes no weight: what it puts in front cannot be merged"
                help = "merge the others by name, or serve the model with its adapters"
                fail(UsageError, "E522", message, help=help)


def _like(tensor: Any) -> Any:
    return nn.Parameter(tensor.detach(), requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor.clone()


def _tensor(model: nn.Module, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _restore_requires_grad(plain: nn.Module, requires_grad: Mapping[str, bool]) -> None:
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(requires_grad.get(name, True) and parameter.is_floating_point())


def _untie(plain: nn.Module) -> None:
    config: Any = getattr(plain, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
