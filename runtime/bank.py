"""The adapters' own tensors, as modules: what is trained, saved and moved."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from peftc.grammar.rule import Init
from peftc.passes.plan import AdapterPlan, ParamKey
from peftc.passes.structure import Dtypes, copy_role

LOW_PRECISION = (torch.float16, torch.bfloat16)


class AdapterParameters(nn.Module):
    """One adapter's parameters and copies, under the names of the modules they belong to."""

    def __init__(self, plan: AdapterPlan, tensors: Mapping[ParamKey, torch.Tensor], trained: frozenset[ParamKey]):
        super().__init__()
        self.plan = plan
        self.planned = {at.site.name: at for at in plan.sites}
        self._holders: dict[ParamKey, tuple[nn.Module, str]] = {}
        for key, tensor in tensors.items():
            holder: nn.Module = self
            for part in key.site.split("."):
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            role = copy_role(key.role)
            if key in trained:
                holder.register_parameter(role, nn.Parameter(tensor))
            else:
                holder.register_buffer(role, tensor)
            self._holders[key] = (holder, role)

    def tensor(self, key: ParamKey) -> torch.Tensor:
        """The live parameter or buffer of a key."""
        holder, role = self._holders[key]
        return getattr(holder, role)

    def attribute(self, key: ParamKey) -> str:
        """The attribute path of a key's tensor within this module."""
        return f"{key.site}.{copy_role(key.role)}"

    def items(self) -> Iterator[tuple[ParamKey, torch.Tensor]]:
        """Every key with its live tensor, in the plan's order."""
        for key in self._holders:
            yield key, self.tensor(key)

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
    """The keys that are parameters; the rest are copied buffers."""
    keys = {ParamKey(plan.name, at.site.name, param.role) for at in plan.sites for param in at.bound.params}
    copied = {(copy.module, name) for copy in plan.copies for name, _, trained in copy.tensors if trained}
    return frozenset(keys | {ParamKey(plan.name, module, name) for module, name in copied})


def initial(plan: AdapterPlan, base: nn.Module) -> dict[ParamKey, torch.Tensor]:
    """Fresh tensors: parameters by their rule's initialiser (torch's random state), copies from the base.

    Adapters of a float16 or bfloat16 base are float32, as in PEFT.
    """
    tensors: dict[ParamKey, torch.Tensor] = {}
    for at in plan.sites:
        dtype = torch.float32 if at.site.dtype in LOW_PRECISION else at.site.dtype
        for param in at.bound.params:
            tensor = torch.empty(param.shape, dtype=dtype, device=at.site.device)
            tensors[ParamKey(plan.name, at.site.name, param.role)] = _fill(tensor, param.init)
    for copy in plan.copies:
        for name, _, _ in copy.tensors:
            source = base.get_submodule(copy.module)
            for part in name.split("."):
                source = getattr(source, part)
            assert isinstance(source, torch.Tensor)
            tensors[ParamKey(plan.name, copy.module, name)] = source.detach().clone()
    return tensors


def prepared(plan: AdapterPlan, tensors: Mapping[ParamKey, torch.Tensor], upcast: bool) -> dict[ParamKey, torch.Tensor]:
    """Loaded tensors on the sites' devices; low precision becomes float32 if `upcast` (PEFT's default)."""
    devices = {at.site.name: at.site.device for at in plan.sites}
    fallback = next(iter(devices.values()), torch.device("cpu"))
    ready = {}
    for key, tensor in tensors.items():
        dtype = torch.float32 if upcast and tensor.dtype in LOW_PRECISION and key.site in devices else tensor.dtype
        ready[key] = tensor.to(device=devices.get(key.site, fallback), dtype=dtype, copy=True)
    return ready


def _fill(tensor: torch.Tensor, init: Init) -> torch.Tensor:
    arguments = dict(init.arguments)
    match init.function:
        case "zeros":
            return tensor.zero_()
        case "ones":
            return tensor.fill_(1.0)
        case "constant":
            return tensor.fill_(arguments["value"])
        case "normal":
            return tensor.normal_(arguments.get("mean", 0.0), arguments.get("std", 1.0))
        case "uniform":
            return tensor.uniform_(arguments["low"], arguments["high"])
        case "kaiming_uniform":
            return nn.init.kaiming_uniform_(tensor, a=arguments.get("a", math.sqrt(5)))
        case "xavier_uniform":
            return nn.init.xavier_uniform_(tensor)
        case _:
            raise AssertionError(f"the checker let an unknown initialiser through: {init.function}")
