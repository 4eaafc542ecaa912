"""Graphs of adapted modules for a compiler or an exporter that goes through the model in the user's own Python."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from peftc.grammar.diagnostics import ModelError, UsageError, fail
from peftc.passes.cost.cost import Choice
from peftc.passes.route.route_rows import ROUTED
from peftc.runtime.execution import nest
from peftc.runtime.execution.engine import COMPILED, Engine
from peftc.runtime.execution.outside import outside
from peftc.runtime.execution.program import Finder, Lowered, graph_module
from peftc.runtime.regions.local import Local, LocalRows, finder, where_kept
from peftc.runtime.regions.region import Bound, Inlined, Region, RegionCall, RegionTrace
from peftc.runtime.regions.template import Template, row_pieces
from peftc.runtime.regions.within import HEAD


class Lowering(Protocol):
    """What makes the graphs of regions."""

    engine: Engine

    def local(self, path: str) -> Local:
        """What adapters have inside of a module."""
        ...

    def lowered(self, trace: RegionTrace, local: Local, autocast: bool, choice: Choice, module: nn.Module) -> Lowered:
        """A trace with what adapters have inside of its module. Raises ModelError."""
        ...


def inlined(host: Lowering, region: Region, tensors: Sequence[torch.Tensor], names: tuple[str, ...]) -> Bound:
    """A program of an adapted module for torch's operators to be recorded as it runs."""
    local = _local(host, region)
    form = tuple((each.dim(), each.dtype) for each in tensors)
    key = ("inlined", form, region.module.training)
    found = local.programs.get(key)
    if isinstance(found, Bound):
        return found
    with outside():
        trace = _traced_from(host, region, local, form, names)
        lowered = host.lowered(trace, local, False, COMPILED, region.module)
        portable = replace(lowered, plain=lowered.traceable, prologue=None, grouped=frozenset())
        kept = where_kept(host.engine, region.module, local)
        code = Template(portable, trace.traced.constants).bind(kept, _rows(host, region, local))
    outputs: nest.Form = trace.traced.outputs  # type: ignore[assignment]
    local.programs[key] = made = Bound(code, outputs, outputs[0] == nest.TENSOR, False, lambda: True)
    return made


def graph_of(host: Lowering, region: Region, form: Any, names: tuple[str, ...]) -> nn.Module:
    """The graph of an adapted module for a compiler, which reads adapters from slots, or what rows have of them."""
    with outside():
        local = _local(host, region)
        trace = _traced_from(host, region, local, form, names)
        lowered = host.lowered(trace, local, False, COMPILED, region.module)
        find, rows = finder(host.engine, region.module, local), _rows(host, region, local)
        if rows is not None:
            find = _reading(lowered, rows, find)
        elif local.tenant is host.engine.active:
            host.engine.bind()
        else:
            message = f"a compiler came to {region.path} while the rows of a call had all the same adapter"
            fail(ModelError, "E424", message, help="compile the model, or call it once with what is active")
        graph = graph_module(lowered.traceable, trace.traced.constants, find)
        return Inlined(graph, trace.traced.outputs)  # type: ignore[arg-type]


def _local(host: Lowering, region: Region) -> Local:
    local = host.local(region.path)
    if local.tenant.gates is not None:
        message = f"a compiler came to {region.path}, whose adapters a route weighs in each call"
        fail(UsageError, "E538", message, help="take the route away: set_route(None)")
    return local


def _rows(host: Lowering, region: Region, local: Local) -> LocalRows | None:
    mixed = local.tenant.mixed
    return None if mixed is None else LocalRows(host.engine, region.module, local, mixed)


def _reading(lowered: Lowered, rows: LocalRows, find: Finder) -> Finder:
    """Where a graph for a compiler finds what it reads: what the rows have, too, which calls refresh."""
    pieces = row_pieces(lowered, rows)
    pieces.refresh()
    rows.local.tenant.compiled.append(pieces)
    routed = nn.Module()
    routed._buffers = pieces.values  # type: ignore[assignment]
    return lambda owner: routed if owner == ROUTED else find(owner)


def _traced_from(host: Lowering, region: Region, local: Local, form: Any, names: tuple[str, ...]) -> RegionTrace:
    """The trace of a module that takes tensors of this form and no other arguments."""
    made, width = [], _width(region.module, local)
    for axes, dtype in form:
        shape = [2 + axis for axis in range(axes)]
        if axes > 2 and _is_convolution(region.module):
            shape = [2, width, *(64 + axis for axis in range(axes - 2))]
        elif axes and dtype.is_floating_point:
            shape[-1] = width
        made.append(torch.zeros(shape, dtype=dtype, device=next(region.module.parameters()).device))
    count = len(made) - len(names)
    call = RegionCall(tuple(made[:count]), dict(zip(names, made[count:], strict=True)))
    found: RegionTrace = host.engine.backend.trace_region(region.module, call)
    return found


def _width(module: nn.Module, local: Local) -> int:
    """How many features a module with adapted weights takes."""
    assert local.part is not None
    for at in local.part.structure.sites:
        if at.site.user == HEAD:
            return at.site.channels * at.site.groups if _is_convolution(module) else at.site.in_features
    weight = next((each for each in module.parameters(recurse=False) if each.dim()), None)
    return 2 if weight is None else weight.shape[-1]


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
