"""What the user's model has and the adapted one holds something else in place of."""

from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from peftc.grammar.spec.spec import Regions
from peftc.passes.foreign import transformers as contract
from peftc.passes.quantized.schemes.known import packed
from peftc.passes.quantized.schemes.packing import Packing
from peftc.runtime.base.kbit import widened_tensors
from peftc.runtime.base.overlay import BANK, Overlay
from peftc.runtime.base.placed import Placed
from peftc.runtime.base.replaced import Replaced, put
from peftc.runtime.execution.engine import Engine
from peftc.runtime.peft_config.peft_config import ConfigFacts
from peftc.runtime.peft_format.manifest import fingerprint

STATE = "_adapter_state"
ADAPTED = contract.HAS_ADAPTERS
COMPILED_CALLS = ("_compiled_call_impl", "_compiled_call")  # bound to this model, no other

Active = tuple[tuple[str, float], ...]
"""Adapter names with their activation weights, in order."""


@dataclass
class BaseProvenance:
    """What a checkpoint says of its base and origin, kept to be saved again."""

    base_name: str | None = None
    base_revision: str | None = None
    task_type: str | None = None
    fingerprint: str | None = None  # of the base before its vocabulary was enlarged for an adapter
    regions: Regions | None = None  # which modules the spec has run graphs, if it says so
    tasks: dict[str, str] = field(default_factory=dict)  # of the adapters whose config names one

    def told(self, facts: Mapping[str, ConfigFacts]) -> None:
        """Keep what configs say of their adapters and of the base."""
        for name, each in facts.items():
            if each.task_type is not None:
                self.tasks[name] = each.task_type
            self.base_revision = self.base_revision or each.revision


@dataclass(frozen=True)
class Resting:
    """Merged weights that are not in the model for now, what they displace, and which adapters they have."""

    tensors: Replaced
    displaced: Replaced
    merged: Active


@dataclass
class BaseWeights:
    """Owns what differs between the user's model and the base that an adapted model holds: merged, or widened.

    Whoever reads the base reads an overlay of it. Only `swap`, for merging and unmerging, and `widen` change modules.
    """

    model: nn.Module
    engine: Engine
    displaced: Replaced = field(default_factory=dict)  # full name -> the base's own tensor, not there while merged
    merged: Active = ()
    resting: "Resting | None" = None  # what is merged, taken out while adapters are disabled
    placed: Mapping[str, Placed] = field(default_factory=dict)  # where what is merged sits, or will when it is back
    widened: Mapping[str, torch.dtype] = field(default_factory=dict)  # held in float32, for the types of before
    requires_grad: Mapping[str, bool] = field(default_factory=dict)  # the user's model's own, given back on unload
    facts: BaseProvenance = field(default_factory=BaseProvenance)

    # --- reading ---

    def own(self) -> Overlay:
        """The user's model: without what is merged, in its own types.

        What is widened is rounded to what it was, anew each time: to hold on to it would take half as much again.
        """
        displaced = self._displaced_now()
        made: dict[int, nn.Parameter] = {}
        narrowed: Replaced = {}
        for name, dtype in self.widened.items():
            wide = self._unmerged_tensor(name, displaced)
            narrowed[name] = made.setdefault(id(wide), nn.Parameter(wide.detach().to(dtype), requires_grad=False))
        return Overlay(base_view(self.model), {**displaced, **narrowed})

    def unmerged(self) -> Overlay:
        """The base without what is merged, in the types it is held in."""
        return Overlay(base_view(self.model), self._displaced_now())

    def traceable(self) -> Overlay:
        """The base as it is, but packed modules, with the biases of now, for those that a merge made dense.

        A trace serves both: how a weight is stored is bound later.
        """
        before: Replaced = {}
        for name, module in self._displaced_now().items():
            held = packed(module) if isinstance(module, nn.Module) else None
            if held is not None and packed(self.model.get_submodule(name)) is None:
                made = held.scheme.share(held.module)
                made._parameters["bias"] = self.model.get_submodule(name)._parameters["bias"]
                before[name] = made
        return Overlay(base_view(self.model), before)

    def fingerprint(self) -> str:
        """A digest of the user's model: of what it had before room was made for new tokens."""
        return self.facts.fingerprint or fingerprint(self.own().identity())

    def unloaded(self) -> nn.Module:
        """A model like the user's, sharing its weights."""
        plain = self.own().copy()
        restore_requires_grad(plain, self.requires_grad)
        return plain

    # --- changing ---

    def swap(self, tensors: Mapping[str, torch.Tensor | nn.Module | None]) -> Replaced:
        """Put these into the model. Returns what was there; what was made for the model before is made anew."""
        before = put(self.model, tensors, {name: each.owner for name, each in self.placed.items()})
        if has_other_biases(before, tensors):
            self.engine.reset()
        elif has_other_packing(before, tensors):
            self.engine.reset(traces=False)
        else:
            self.engine.storage.refresh()
        return before

    def place(self, changed: Collection[str] = ()) -> None:
        """Remember what is merged as it is now: where it sits, and that nobody changed it, but what is `changed`."""
        placed: dict[str, Placed] = {}
        for name in self.displaced:
            owner, _, leaf = name.rpartition(".")
            known = self.placed.get(name)
            now = Placed.now(self.model.get_submodule(owner) if known is None else known.owner, leaf)
            placed[name] = replace(now, parts=None) if name in changed else now
        self.placed = placed

    def merged_names(self) -> Iterator[tuple[str, str]]:
        """The names that merging knew its tensors and modules by, last ones first, each with its name of today.

        A module that was moved has another; what was taken out of the model has none, and is left out.
        """
        places: dict[int, list[str]] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            places.setdefault(id(module), []).append(path)
        for name in self.displaced:
            owner, _, leaf = name.rpartition(".")
            found = places.get(id(self.placed[name].owner), [])
            for path in (owner,) if owner in found else found:
                yield name, f"{path}.{leaf}" if path else leaf

    def changed_since(self) -> list[str]:
        """Names of what is merged and somebody else has replaced or written to since."""
        return [name for name in self.displaced if not self.placed[name].is_untouched()]

    def differing(self, state_dict: Mapping[str, Any]) -> list[str]:
        """Names of what is merged that a state dict has other values for."""
        found: list[str] = []
        for name, now in self.merged_names():
            value = self.placed[name].value
            held = {now: value} if isinstance(value, torch.Tensor) else _parameters(now, value)
            if any(key in state_dict and not _is_equal(state_dict[key], each) for key, each in held.items()):
                found.append(name)
        return found

    @property
    def is_merged(self) -> bool:
        """Whether adapters are in the weights, or would be if they were not disabled."""
        return bool(self.displaced) or self.resting is not None

    @property
    def merged_adapters(self) -> Active:
        """The adapters in the weights, or that would be if they were not disabled, with their weights."""
        return self.merged if self.resting is None else self.resting.merged

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor], changed: Collection[str]) -> None:
        """Do to what is out of the model for now what was done to the model's tensors: it was moved, say.

        `changed` is what `changed_since` said before.
        """
        made: dict[int, Any] = {}

        def applied(values: Replaced) -> Replaced:
            return {name: made.setdefault(id(value), _applied(value, fn)) for name, value in values.items()}

        self.displaced = applied(self.displaced)
        if self.resting is not None:
            tensors, displaced = applied(self.resting.tensors), applied(self.resting.displaced)
            self.resting = replace(self.resting, tensors=tensors, displaced=displaced)
            return
        self.place(changed)

    def widen(self) -> None:
        """Hold what a quantized base has beside its packed weights in float32, as training wants it."""
        before = put(self.model, widened_tensors(base_view(self.model)))
        if before:
            types = {name: each.dtype for name, each in before.items() if isinstance(each, torch.Tensor)}
            self.widened = {**types, **self.widened}
            self.engine.reset()

    def copy_for(self, model: nn.Module, engine: Engine, memo: dict[int, object]) -> "BaseWeights":
        """Those of a deep copy of the model."""
        displaced, resting, placed = deepcopy((self.displaced, self.resting, self.placed), memo)
        facts = replace(self.facts)
        return replace(
            self, model=model, engine=engine, displaced=displaced, resting=resting, placed=placed, facts=facts
        )

    def _displaced_now(self) -> Replaced:
        """What is displaced, by the names that it would have today."""
        return {now: self.displaced[name] for name, now in self.merged_names()} if self.displaced else {}

    def _unmerged_tensor(self, name: str, displaced: Replaced) -> torch.Tensor:
        owner, _, leaf = name.rpartition(".")
        module, tensor = displaced.get(owner), displaced.get(name)
        if isinstance(tensor, torch.Tensor):
            return tensor
        found = module if isinstance(module, nn.Module) else self.model.get_submodule(owner)
        return found.get_parameter(leaf)


def _parameters(name: str, module: nn.Module | None) -> dict[str, torch.Tensor]:
    return {} if module is None else {f"{name}.{leaf}": each for leaf, each in module.named_parameters()}


def _is_equal(given: Any, held: torch.Tensor) -> bool:
    return isinstance(given, torch.Tensor) and given.shape == held.shape and torch.equal(given.to(held), held)


def _applied(value: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, nn.Module):
        return value._apply(fn)  # type: ignore[no-untyped-call]
    if isinstance(value, nn.Parameter):
        return nn.Parameter(fn(value.detach()), requires_grad=value.requires_grad)
    return value if value is None else fn(value)


def base_view(model: nn.Module) -> nn.Module:
    """An adapted model as an object of the user's class: the same modules, without the adapters. Not to be kept."""
    user_class: Any = model.base_class
    view: nn.Module = object.__new__(user_class)
    view.__dict__.update({name: value for name, value in model.__dict__.items() if name not in (STATE, ADAPTED)})
    view.__dict__["_modules"] = {name: module for name, module in model._modules.items() if name != BANK}
    for name in (*COMPILED_CALLS, "forward", "_old_forward"):
        view.__dict__.pop(name, None)
    return view


def restore_requires_grad(plain: nn.Module, requires_grad: Mapping[str, bool]) -> None:
    """Give the parameters of a plain model back what they had of it; others can be trained."""
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(requires_grad.get(name, True) and parameter.is_floating_point())


def has_other_biases(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a bias came or went: a trace reads one only where there was one when it was made."""
    return any(bias_came_or_went(old, after[name]) for name, old in before.items())


def has_other_packing(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a weight is stored in another way."""
    return any(_packing(old) != _packing(after[name]) for name, old in before.items())


def bias_came_or_went(old: Any, new: Any) -> bool:
    """Whether one of these, in the place of the other, gives a module a bias or takes it away."""
    if isinstance(old, nn.Module) and isinstance(new, nn.Module):
        return (old._parameters.get("bias") is None) != (new._parameters.get("bias") is None)
    return (old is None) != (new is None)


def _packing(value: Any) -> Packing | None:
    held = packed(value) if isinstance(value, nn.Module) else None
    return None if held is None else held.packing
