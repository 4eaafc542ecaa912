"""Slots: where graphs read the active adapters' tensors. Switching an adapter is putting other tensors there."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftc.passes.plan.plan import IDS, ORDER, ROWS, ParamKey
from peftc.passes.plan.structure import (
    FLOAT,
    LOG_WEIGHT,
    copy_slot,
    rows_slot,
    site_slot,
    slot_role,
    weighted,
)
from peftc.runtime.adapters.bank import AdapterParameters

Weighed = Sequence[tuple[AdapterParameters, float]]
"""Adapters in the order of their activation, with their weights."""

Binding = tuple[dict[str, Any], str, torch.Tensor | float]
"""A dictionary of a slot, the name in it, and the tensor (for a scalar also the number) to put there."""


class Slots:
    """Every slot of a model, made on first use; all graphs of the model read the same ones."""

    def __init__(self) -> None:
        self._modules: dict[str, nn.Module] = {}

    def module(self, path: str) -> nn.Module:
        """The slot of this attribute path."""
        if path not in self._modules:
            self._modules[path] = nn.Module()
        return self._modules[path]

    def clear(self) -> None:
        """Let go of every tensor: an adapter that is removed is not to live on here."""
        for module in self._modules.values():
            module._parameters.clear()
            module._buffers.clear()

    def bindings(self, active: Weighed, instead: Mapping[tuple[str, str], torch.Tensor] | None = None) -> list[Binding]:
        """What to put where so that these adapters are active in this order, with these activation weights.

        `instead` are tensors to put there in place of some, by slot and name.
        """
        found: list[Binding] = []
        for entry in _all_entries(active):
            slot = self.module(entry.slot)
            value = (instead or {}).get((entry.slot, entry.name), entry.value)
            if isinstance(value, torch.Tensor):
                found.append(_binding(slot, entry.name, value))
            else:
                found.append((slot.__dict__, entry.name, entry.value))
        return found

    def tensors(self, adapter: AdapterParameters) -> dict[str, torch.Tensor]:
        """What would be in the slots if this adapter alone were active, by attribute path."""
        bindings = self.bindings([(adapter, 1.0)])
        paths = {id(held): path for path, slot in self._modules.items() for held in (slot._parameters, slot._buffers)}
        return {
            f"{paths[id(holder)]}.{name}": value for holder, name, value in bindings if isinstance(value, torch.Tensor)
        }


Kept = tuple[dict[str, Any], str]
"""A dictionary, and the name in it of a value, which may be replaced there."""


@dataclass(frozen=True, eq=False)
class Entry:
    """What a slot has under a name; `held` is where the adapter keeps it, if it is a tensor of its own."""

    slot: str
    name: str
    value: torch.Tensor | float
    held: Kept | None = None


def entries(position: int, adapter: AdapterParameters, weight: float) -> Iterator[Entry]:
    """All that slots have of an adapter, active at a position with a weight."""
    name, plan = adapter.plan.name, adapter.plan
    for at in plan.sites:
        slot = site_slot(position, at.site.name)
        tensors = []
        for param in at.bound.params:
            key = at.key(name, param)
            tensors.append(adapter.tensor(key))
            yield Entry(slot, slot_role(param.role), tensors[-1], adapter.held(key))
        like = next((each for each in tensors if each.is_floating_point()), torch.empty(0))
        for scalar, value in scalars(adapter, at.site.name, weight).items():
            yield Entry(slot, slot_role(scalar), like.new_tensor(value))
            yield Entry(slot, FLOAT + slot_role(scalar), value)
        if at.site.kind == "cache":
            yield Entry(slot, LOG_WEIGHT, like.new_tensor(math.log(weight) if weight else -math.inf))
    for copy in plan.copies:
        for tensor_name, _, _ in copy.tensors:
            key = ParamKey(name, copy.module, tensor_name)
            slot = copy_slot(position, copy.module)
            yield Entry(slot, slot_role(tensor_name), adapter.tensor(key), adapter.held(key))
    for rows in plan.rows:
        for role in (ROWS, IDS, ORDER):
            key = ParamKey(name, rows.module, role)
            slot = rows_slot(position, rows.module)
            yield Entry(slot, slot_role(role), adapter.tensor(key), adapter.held(key))


Sources = Mapping[tuple[str, str], Kept]
"""A slot and a name in it -> where the value is kept."""


def sources(active: Weighed) -> Sources:
    """Where everything is kept that slots have of adapters active in this order, with their weights."""
    found: dict[tuple[str, str], Kept] = {}
    for entry in _all_entries(active):
        own = ({entry.name: entry.value}, entry.name)
        found[entry.slot, entry.name] = own if entry.held is None else entry.held
    return found


def _all_entries(active: Weighed) -> list[Entry]:
    """Scalars of them are tensors that can be trained with, whoever asks first."""
    with torch.inference_mode(False):
        return [each for place, (adapter, weight) in enumerate(active) for each in entries(place, adapter, weight)]


def scalars(adapter: AdapterParameters, site: str, weight: float) -> dict[str, float]:
    """The scalars of an adapter at a site, the activation weight folded into the one that carries it."""
    bound = adapter.planned[site].bound
    values = dict(bound.scalars)
    _, carrier = weighted(bound.weight, bound.bias)
    if carrier is not None:
        values[carrier] = values.get(carrier, 1.0) * weight
    return values


def bind(bindings: list[Binding]) -> None:
    """Put the tensors there."""
    for holder, name, tensor in bindings:
        holder[name] = tensor


def _binding(slot: nn.Module, name: str, tensor: torch.Tensor) -> Binding:
    holder: dict[str, Any] = slot._parameters if isinstance(tensor, nn.Parameter) else slot._buffers
    other: dict[str, Any] = slot._buffers if isinstance(tensor, nn.Parameter) else slot._parameters
    other.pop(name, None)
    return holder, name, tensor
