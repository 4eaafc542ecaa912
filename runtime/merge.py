"""Merges the active adapters into a model's weights, and takes them out again exactly."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from peftc.grammar import algebra
from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.apply import Primes, compose, renamed
from peftc.passes.materialise import Values, to_logical, to_stored, unstack
from peftc.passes.plan import ROWS, ParamKey, PlannedRows, PlannedSite
from peftc.passes.scene import Eager
from peftc.passes.structure import weighted
from peftc.runtime.bank import AdapterParameters
from peftc.runtime.slots import scalars

Merged = dict[str, torch.Tensor]
"""Full tensor name -> the new tensor."""

Terms = Sequence[tuple[AdapterParameters, float, PlannedSite]]
"""What is merged at one site: adapters, their weights, and what they put there."""

Replaced = dict[str, torch.Tensor | None]
"""Full tensor name -> what was there: nothing, where a merge gave a module a bias."""


@torch.no_grad()
def merged_tensors(
    model: nn.Module, active: Sequence[tuple[AdapterParameters, float]], *, safe_merge: bool = False
) -> Merged:
    """The tensors of the model that change when these adapters are merged, computed in the adapters' precision.

    Raises UsageError, with `safe_merge`, if one is not finite. Changes nothing.
    """
    merged = replaced_tensors(model, [adapter for adapter, _ in active])
    for terms in merged_sites(active):
        merged |= merged_site(model, terms, changed=merged)
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


@torch.no_grad()
def replaced_tensors(model: nn.Module, adapters: Sequence[AdapterParameters]) -> Merged:
    """The tensors these adapters put others in place of; what they adapt, they adapt with those.

    Where an adapter ties its copy to other tensors too, these become the same tensor.
    """
    merged = merged_rows(model, adapters)
    for adapter in adapters:
        for copy in adapter.plan.copies:
            for tensor, _, trained in copy.tensors:
                new = adapter.tensor(ParamKey(adapter.plan.name, copy.module, tensor)).detach().clone()
                new = nn.Parameter(new, requires_grad=False) if trained else new
                merged |= dict.fromkeys(copy.names(tensor), new)
    return merged


@torch.no_grad()
def merged_rows(model: nn.Module, adapters: Sequence[AdapterParameters]) -> Merged:
    """The weights in which these adapters replace rows; those that are tied stay one tensor if all get the same."""
    found: dict[str, list[tuple[AdapterParameters, PlannedRows]]] = {}
    for adapter in adapters:
        for rows in adapter.plan.rows:
            for module in rows.modules:
                found.setdefault(f"{module}.weight".lstrip("."), []).append((adapter, rows))
    made: dict[tuple[int, tuple[tuple[str, str], ...]], torch.Tensor] = {}
    merged: Merged = {}
    for name, replaced in found.items():
        weight = model.get_parameter(name)
        key = (id(weight), tuple((adapter.plan.name, rows.module) for adapter, rows in replaced))
        if key not in made:
            new = weight.detach().clone()
            for adapter, rows in replaced:
                own = adapter.tensor(ParamKey(adapter.plan.name, rows.module, ROWS))
                new[torch.tensor(rows.ids, device=new.device)] = own.detach().to(new)
            made[key] = nn.Parameter(new, requires_grad=False)
        merged[name] = made[key]
    return merged


def put(model: nn.Module, tensors: Mapping[str, torch.Tensor | None]) -> Replaced:
    """Replace tensors of the model by others, and return what was there. The old ones are not written to."""
    before: Replaced = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            before[name] = module._parameters[leaf]
            if tensor is None or isinstance(tensor, nn.Parameter):
                module._parameters[leaf] = tensor
            else:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            before[name] = module._buffers[leaf]
            module._buffers[leaf] = tensor
    return before


def merged_sites(active: Sequence[tuple[AdapterParameters, float]]) -> Iterator[Terms]:
    """Of every site that one of these adapters adapts, all that do, in order."""
    for name in dict.fromkeys(at.site.name for adapter, _ in active for at in adapter.plan.sites):
        yield [(each, weight, each.planned[name]) for each, weight in active if name in each.planned]


def merged_site(
    model: nn.Module,
    terms: Terms,
    *,
    exact: torch.dtype | None = None,
    changed: Mapping[str, torch.Tensor] | None = None,
) -> Merged:
    """The tensors of a site once these adapters are merged.

    They are computed in the widest of the types involved and rounded to the base's; or in `exact`, and not rounded.
    `changed` are tensors of the model that others have taken the place of.
    """
    site = terms[0][2].site
    ops = Eager()
    params: dict[str, torch.Tensor] = {}
    scalar_values: dict[str, torch.Tensor | float] = {}
    primes: list[Primes] = []
    for position, (adapter, weight, at) in enumerate(terms):
        prefix = f"{position}:"
        for param in at.bound.params:
            tensor = adapter.tensor(at.key(adapter.plan.name, param)).detach()
            tensor = tensor if exact is None or not tensor.is_floating_point() else tensor.to(exact)
            params[prefix + param.role] = unstack(ops, tensor, param.stacked_axis, param.shared, site)
        scalar_values |= {prefix + name: value for name, value in scalars(adapter, site.name, weight).items()}
        own_bias = at.bound.bias
        matrix = weighted(at.bound.weight, own_bias)[0]
        primes.append((renamed(matrix, prefix), None if own_bias is None else renamed(own_bias, prefix)))
    own = (changed or {}).get(site.weight)
    stored = model.get_parameter(site.weight) if own is None else own
    bias = (changed or {}).get(site.bias, model.get_parameter(site.bias)) if site.has_bias else None
    dtype = exact or stored.dtype
    for each in params.values():
        dtype = torch.promote_types(dtype, each.dtype) if each.is_floating_point() else dtype
    values = Values(
        ops,
        params,
        scalar_values,
        weight=lambda: to_logical(ops, stored.detach().to(dtype), site),
        bias=None if bias is None else bias.detach().to(dtype),
        lead=site.lead,
    )
    new_weight, new_bias = compose(primes, site.has_bias)
    merged: Merged = {}
    if new_weight != algebra.Weight():
        merged[site.weight] = to_stored(ops, values.of(new_weight), site)
    if new_bias is not None:
        merged[site.bias] = values.of(new_bias)
    return {name: value.to(exact or stored.dtype).contiguous() for name, value in merged.items()}
