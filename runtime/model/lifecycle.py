"""Adding, activating, disabling, merging and removing adapters: the methods users know from PEFT and transformers."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any

from peftc.grammar.diagnostics import UsageError, fail
from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.spec.spec import AdapterSpec, Spec
from peftc.passes.plan.plan import AdapterPlan
from peftc.passes.quantized.schemes.known import parameter_count
from peftc.runtime.adapters.bank import AdapterParameters, trained_keys
from peftc.runtime.base.base import base_values
from peftc.runtime.init.calibration import Batches, measured
from peftc.runtime.init.dense import Dense, Source
from peftc.runtime.init.initial import initial
from peftc.runtime.init.tokens import size_of, warn_unchosen, with_ids
from peftc.runtime.model.merging import Merging
from peftc.runtime.model.state import Active, AdapterState
from peftc.runtime.peft_format.peft_config import read_config


class Lifecycle(Merging):
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
        dense: Source | None = None,
    ) -> None:
        """Add a fresh adapter and activate it, as transformers' `add_adapter`.

        `adapter_config` is a spec (a path, the text itself, a `Spec` or `AdapterSpec` with one adapter) or a PEFT
        config (an object with `to_dict`, or a dict). PEFT's order, the name first, is understood too. `calibration` are
        the batches that a method needs which starts from data, as in `apply`; the base runs on them. `tokenizer` is
        for tokens that a spec names by their text, for new ones, and for a method that starts from a text. `dense` is
        what a quantized base was made from, as in `apply`. Raises SpecError or UsageError and leaves the model as it
        was.
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
        base = base_values(self, self._adapter_state.merged)
        weights = None if dense is None else Dense(dense)
        tensors = initial(plan, base, calibration=moments, tokenizer=tokenizer, dense=weights)
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

    # --- looking ---

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are in all, as PEFT counts: packed or not."""
        trainable = sum(each.numel() for each in self.parameters() if each.requires_grad)
        return trainable, parameter_count(self)

    def print_trainable_parameters(self) -> None:
        """Print the counts in PEFT's format."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def adapter_plan(self, adapter_name: str) -> AdapterPlan:
        """Which rule with which values an adapter puts where. Raises UsageError for an unknown name."""
        return self._adapter_state.adapter(adapter_name).plan

    def _enable(self, enabled: bool) -> None:
        self._adapter_state.enabled = enabled
        self._adapter_state.activate(self._adapter_state.active)

    def _enlarge(self, size: int, *, drawn: bool = True) -> None:
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
