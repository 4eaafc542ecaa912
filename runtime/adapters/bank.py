"""The adapters' own tensors, as modules: what is trained, saved and moved."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peftc.passes.plan.plan import ROWS, AdapterPlan, ParamKey
from peftc.passes.plan.structure import Dtypes, flat, slot_role
from peftc.runtime.adapters.allocation import Allocator, budgeted

ALLOCATOR = "@allocator"  # no module of a model is called so


class AdapterParameters(nn.Module):
    """One adapter's parameters and copies, under the names of the modules they belong to, dots written `__`.

    So whoever goes through a model's modules by their names meets each of the base's once.
    """

    def __init__(self, plan: AdapterPlan, tensors: Mapping[ParamKey, torch.Tensor], trained: frozenset[ParamKey]):
        super().__init__()
        self.plan = plan
        self.planned = {at.site.name: at for at in plan.sites}
        self.frozen = False  # kept from gradients on purpose, and not only while another adapter is active
        self._holders: dict[ParamKey, tuple[nn.Module, str]] = {}
        for key, tensor in tensors.items():
            holder: nn.Module | None = self
            if key.site:
                name = flat(key.site)
                holder = self._modules.get(name)  # a server loads thousands of these: no look-up by path
                if holder is None:
                    holder = nn.Module()
                    self.add_module(name, holder)
            assert holder is not None
            role = slot_role(key.role)
            if key in trained:
                holder.register_parameter(role, nn.Parameter(tensor))
            else:
                holder.register_buffer(role, tensor)
            self._holders[key] = (holder, role)
        # Where the first parameter is kept: of thousands of adapters it is asked for whenever one is activated.
        kept = ((holder._parameters, role) for holder, role in self._holders.values() if role in holder._parameters)
        self._first = next(kept, None)
        if budgeted(plan):
            self.add_module(ALLOCATOR, Allocator(plan))

    def renamed(self, name: str) -> "AdapterParameters":
        """The same tensors as an adapter of another name, which takes this one's place."""
        plan = replace(self.plan, spec=replace(self.plan.spec, name=name))
        tensors = {key._replace(adapter=name): tensor.detach() for key, tensor in self.items()}
        made = AdapterParameters(plan, tensors, trained_keys(plan))
        if self.allocator is not None:
            made.load_state_dict(self.state_dict())
        return made

    @property
    def allocator(self) -> Allocator | None:
        """What deals out the adapter's budget, if its method keeps one."""
        found = self._modules.get(ALLOCATOR)
        return found if isinstance(found, Allocator) else None

    def _load_from_state_dict(self, state_dict: Mapping[str, torch.Tensor], prefix: str, *rest: Any) -> None:
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if own and self.allocator is not None:
            start = f"{ALLOCATOR}."
            self.allocator.expect({key.removeprefix(start): own[key] for key in own if key.startswith(start)})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def penalty(self) -> torch.Tensor | None:
        """What is added to the loss in training, if anything is."""
        allocator = self.allocator
        if allocator is None or not allocator.schedule.orthogonal:
            return None
        return allocator.penalty(self.tensor)

    def tensor(self, key: ParamKey) -> torch.Tensor:
        """The live parameter or buffer of a key."""
        holder, role = self._holders[key]
        return getattr(holder, role)

    def held(self, key: ParamKey) -> tuple[dict[str, Any], str]:
        """The dictionary that a key's tensor is kept in, and its name there: what is replaced is seen."""
        holder, role = self._holders[key]
        found: dict[str, Any] = holder._parameters if role in holder._parameters else holder._buffers
        return found, role

    def attribute(self, key: ParamKey) -> str:
        """The attribute path of a key's tensor within this module."""
        return f"{flat(key.site)}.{slot_role(key.role)}".lstrip(".")

    def items(self) -> Iterator[tuple[ParamKey, torch.Tensor]]:
        """Every key with its live tensor, in the plan's order."""
        for key in self._holders:
            yield key, self.tensor(key)

    def at_site(self, site: str) -> dict[str, torch.Tensor]:
        """The tensors a site's expression reads, shared ones included, by role."""
        at = self.planned[site]
        return {param.role: self.tensor(at.key(self.plan.name, param)) for param in at.bound.params}

    @property
    def is_trainable(self) -> bool:
        """Whether a gradient can reach it."""
        if self._first is None:
            return False
        parameters, role = self._first
        first = parameters[role]
        return first is not None and first.requires_grad

    def dtypes(self) -> Dtypes:
        """The type of every tensor, by site and role."""
        return {(key.site, key.role): tensor.dtype for key, tensor in self.items()}

    def train_only(self, trainable: bool) -> None:
        """Whether gradients reach the parameters; touches only those that differ."""
        # Not `self.parameters()`, which walks the module tree: switching comes through here.
        for holder, role in self._holders.values():
            parameter = holder._parameters.get(role)
            if parameter is not None and parameter.requires_grad is not trainable:
                parameter.requires_grad = trainable


def trained_keys(plan: AdapterPlan) -> frozenset[ParamKey]:
    """The keys that are parameters; the rest are constants and copied buffers."""
    keys = {at.key(plan.name, param) for at in plan.sites for param in at.bound.params if param.trained}
    copied = {(copy.module, name) for copy in plan.copies for name, _, trained in copy.tensors if trained}
    copied |= {(rows.module, ROWS) for rows in plan.rows}
    return frozenset(keys | {ParamKey(plan.name, module, name) for module, name in copied})
