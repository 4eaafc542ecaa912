"""Merges the active adapters into a model's weights, and takes them out again exactly."""

from collections.abc import Sequence

import torch
from torch import nn

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.apply import compose, renamed
from peftc.passes.materialise import Eager, materialise, to_logical, to_stored, unstack
from peftc.passes.plan import ParamKey, PlannedSite
from peftc.passes.structure import stacked_axis, weighted
from peftc.runtime.bank import AdapterParameters
from peftc.runtime.slots import scalars

Merged = dict[str, torch.Tensor]
"""Full tensor name -> the new tensor."""


@torch.no_grad()
def merged_tensors(
    model: nn.Module, active: Sequence[tuple[AdapterParameters, float]], *, safe_merge: bool = False
) -> Merged:
    """The tensors of the model that change when these adapters are merged, computed in the adapters' precision.

    Raises UsageError, with `safe_merge`, if one is not finite. Changes nothing.
    """
    merged: Merged = {}
    for name in dict.fromkeys(at.site.name for adapter, _ in active for at in adapter.plan.sites):
        terms = [(each, weight, each.planned[name]) for each, weight in active if name in each.planned]
        site = terms[0][2].site
        merged[site.weight] = _merge_site(model.get_parameter(site.weight), terms)
    for adapter, _ in active:
        for copy in adapter.plan.copies:
            for tensor, _, _ in copy.tensors:
                own = adapter.tensor(ParamKey(adapter.plan.name, copy.module, tensor))
                merged[f"{copy.module}.{tensor}"] = own.detach().clone()
    if safe_merge:
        for name, value in merged.items():
            if not torch.isfinite(value).all():
                fail(
                    UsageError,
                    "E520",
                    f"merging would put NaN or infinite values into {name}",
                    help="nothing was merged",
                )
    return merged


def put(model: nn.Module, tensors: Merged) -> Merged:
    """Replace tensors of the model by others, and return what was there. The old ones are not written to."""
    before: Merged = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            old = module._parameters[leaf]
            assert old is not None
            before[name] = old
            new = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            module._parameters[leaf] = new
        else:
            old_buffer = module._buffers[leaf]
            assert old_buffer is not None
            before[name] = old_buffer
            module._buffers[leaf] = tensor
    return before


def _merge_site(stored: torch.Tensor, terms: Sequence[tuple[AdapterParameters, float, PlannedSite]]) -> torch.Tensor:
    ops, site = Eager(), terms[0][2].site
    params: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor | float] = {}
    matrices = []
    for position, (adapter, weight, at) in enumerate(terms):
        prefix = f"{position}:"
        for rule in at.bound.rule.params:
            tensor = adapter.tensor(ParamKey(adapter.plan.name, site.name, rule.role)).detach()
            sizes = (tensor.shape[0], tensor.shape[1]) if tensor.dim() == 2 else (0, 0)
            params[prefix + rule.role] = unstack(ops, tensor, stacked_axis(rule), sizes, site)
        values |= {prefix + name: value for name, value in scalars(adapter, site.name, weight).items()}
        matrices.append(renamed(weighted(at.bound.weight)[0], prefix))
    dtype = torch.promote_types(stored.dtype, next(iter(params.values())).dtype)
    weight_value = to_logical(ops, stored.detach().to(dtype), site)
    merged = to_stored(ops, materialise(compose(tuple(matrices)), ops, weight_value, params, values), site)
    return merged.to(stored.dtype).contiguous()
