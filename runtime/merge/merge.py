"""Merges the active adapters into a model's weights, and takes them out again exactly."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from peftc.grammar.algebra import algebra
from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.expression.apply import Primes, compose, renamed
from peftc.passes.expression.materialise import Evaluator, to_logical, to_stored, unstack
from peftc.passes.expression.precision import at_least_float32
from peftc.passes.expression.scene import Eager
from peftc.passes.plan.plain import make_plain
from peftc.passes.plan.plan import ROWS, ParamKey, PlannedRows, PlannedSite
from peftc.passes.plan.site import Site
from peftc.passes.plan.structure import weighted
from peftc.passes.quantized.schemes.known import packed
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.adapters.slots import scalars
from peftc.runtime.merge.repack import DEQUANTIZE, Quantized, check_packed, stored, unpacked_modules

Merged = dict[str, torch.Tensor]
"""Full tensor name -> the new tensor."""

Changes = dict[str, torch.Tensor | nn.Module]
"""Full tensor name -> the new tensor; or the name of a module that stores its weight packed -> the new module."""

Terms = Sequence[tuple[AdapterParameters, float, PlannedSite]]
"""What is merged at one site: adapters, their weights, and what they put there."""


@torch.no_grad()
def merged_tensors(
    model: nn.Module,
    active: Sequence[tuple[AdapterParameters, float]],
    *,
    safe_merge: bool = False,
    quantized: Quantized | None = None,
) -> Changes:
    """What changes in the model when these adapters are merged, computed in the adapters' precision.

    `quantized` says what becomes of weights that are stored packed. Raises UsageError if it does not and one is adapted
    and, with `safe_merge`, if a value is not finite. Changes nothing.
    """
    check_packed(active, quantized)
    copied = replaced_tensors(model, [adapter for adapter, _ in active])
    tensors, modules = dict(copied), dict[str, nn.Module]()
    check_finite(copied, safe_merge)
    for terms in merged_sites(active):
        found = merged_site(model, terms, changed=copied)
        check_finite(found, safe_merge)
        site = terms[0][2].site
        if site.packing is None:
            tensors |= found
            continue
        modules[site.module] = stored(model, site, {**_held_by(site.module, copied), **found}, quantized)
    if quantized == DEQUANTIZE:
        modules |= unpacked_modules(model, modules, copied)
    for made in modules.values():
        make_plain(made)
    folded = {name for module in modules for name in _held_by(module, copied)}
    return {**modules, **{name: tensor for name, tensor in tensors.items() if name not in folded}}


def _held_by(module: str, tensors: Mapping[str, torch.Tensor]) -> Merged:
    name = f"{module}.bias"
    return {name: tensors[name]} if name in tensors else {}


def check_finite(tensors: Mapping[str, torch.Tensor], safe_merge: bool) -> None:
    """Raise UsageError, with `safe_merge`, if a value is not finite."""
    for name, value in tensors.items() if safe_merge else ():
        if not torch.isfinite(value).all():
            message = f"merging would put NaN or infinite values into {name}"
            fail(UsageError, "E520", message, help="nothing was merged")


@torch.no_grad()
def replaced_tensors(model: nn.Module, adapters: Sequence[AdapterParameters]) -> Merged:
    """The tensors these adapters put others in place of; what they adapt, they adapt with those.

    Where an adapter ties its copy to other tensors too, these become the same tensor.
    """
    merged: Merged = {}
    copies = [(adapter, copy) for adapter in adapters for copy in adapter.plan.copies]
    for adapter, copy in sorted(copies, key=lambda each: not each[1].read):  # which trained ones go before
        for tensor, _, trained in copy.tensors:
            new = adapter.tensor(ParamKey(adapter.plan.name, copy.module, tensor)).detach().clone()
            new = nn.Parameter(new, requires_grad=False) if trained or copy.read else new
            merged |= dict.fromkeys(copy.names(tensor), new)
    return merged | merged_rows(model, adapters, merged)


@torch.no_grad()
def merged_rows(model: nn.Module, adapters: Sequence[AdapterParameters], changed: Merged) -> Merged:
    """The weights in which these adapters replace rows; those that are tied stay one tensor if all get the same.

    `changed` are tensors of the model that others have taken the place of.
    """
    found: dict[str, list[tuple[AdapterParameters, PlannedRows]]] = {}
    for adapter in adapters:
        for rows in adapter.plan.rows:
            for module in rows.modules:
                found.setdefault(f"{module}.weight".lstrip("."), []).append((adapter, rows))
    made: dict[tuple[int, tuple[tuple[str, str], ...]], torch.Tensor] = {}
    merged: Merged = {}
    for name, replaced in found.items():
        weight = changed[name] if name in changed else model.get_parameter(name)
        key = (id(weight), tuple((adapter.plan.name, rows.module) for adapter, rows in replaced))
        if key not in made:
            new = weight.detach().clone()
            for adapter, rows in replaced:
                own = adapter.tensor(ParamKey(adapter.plan.name, rows.module, ROWS))
                new[torch.tensor(rows.ids, device=new.device)] = own.detach().to(new)
            made[key] = nn.Parameter(new, requires_grad=False)
        merged[name] = made[key]
    return merged


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

    They are computed in the widest of the types involved, float32 at least, and rounded to the base's; or in `exact`,
    and not rounded.
    A weight that is stored packed is unpacked, and neither rounded nor packed again. `changed` are tensors of the model
    that others have taken the place of.
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
            if tensor.is_floating_point():
                tensor = tensor.to(exact or at_least_float32(tensor.dtype))
            params[prefix + param.role] = unstack(ops, tensor, param.stacked_axis, param.shared, site)
        scalar_values |= {prefix + name: value for name, value in scalars(adapter, site.name, weight).items()}
        own_bias = at.bound.bias
        matrix = weighted(at.bound.weight, own_bias)[0]
        primes.append((renamed(matrix, prefix), None if own_bias is None else renamed(own_bias, prefix)))
    held = packed(model.get_submodule(site.module)) if site.packing is not None else None
    base = _weight(model, site, changed or {}) if held is None else held.unpack()
    bias = (changed or {}).get(site.bias, bias_of(model, site))
    dtype = exact or at_least_float32(base.dtype)
    for each in params.values():
        dtype = torch.promote_types(dtype, each.dtype) if each.is_floating_point() else dtype
    values = Evaluator(
        ops,
        params,
        scalar_values,
        weight=lambda: to_logical(ops, base.detach().to(dtype), site),
        bias=None if bias is None else bias.detach().to(dtype),
        lead=site.lead,
    )
    new_weight, new_bias = compose(primes, bias is not None)
    merged: Merged = {}
    if new_weight != algebra.Weight():
        merged[site.weight] = to_stored(ops, values.of(new_weight), site)
    if new_bias is not None:
        merged[site.bias] = values.of(new_bias)
    kept = exact or (base.dtype if held is None else dtype)
    return {name: value.to(kept).contiguous() for name, value in merged.items()}


def bias_of(model: nn.Module, site: Site) -> torch.Tensor | None:
    """The bias that a module has now, whatever it had when an adapter was planned."""
    owner, _, leaf = site.bias.rpartition(".")
    return model.get_submodule(owner)._parameters.get(leaf)


def _weight(model: nn.Module, site: Site, changed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    own = changed.get(site.weight)
    return model.get_parameter(site.weight) if own is None else own
