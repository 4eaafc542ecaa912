"""What a site costs under each lowering, read off the graph each would make: flops, bytes moved, operators called.

A site is lowered alone, as one `linear(x, W, b)` over so many tokens, and every operator of the result is counted with
the sizes it has there. The time is that of the arithmetic, of the memory traffic and of the calls, added up: operators
do not overlap, and a matrix product first copies its operands into an order of its own. What only the weights and
parameters go into is left out where nothing trains: it is computed once and kept.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from peftc.passes.cost.op_cost import Work, backward_work, forward_work, trained_nodes
from peftc.passes.insert.insert_delta import InsertDelta
from peftc.passes.ir.emit import fake_like
from peftc.passes.optimize.fuse_low_rank import FuseLowRank
from peftc.passes.optimize.hoist import kept_nodes
from peftc.passes.plan.site import Site
from peftc.passes.plan.structure import AdaptedSite, Structure
from peftc.passes.quantized.packed_operators import QUANTIZED_LINEAR

aten = torch.ops.aten

Lowering = Literal["pushed", "dense", "kept"]
"""The activation goes through the expression; W' is computed in every call; W' is computed once and kept."""

LOWERINGS: tuple[Lowering, ...] = ("pushed", "dense", "kept")


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, and the time to call one operator."""

    flops: float
    bytes: float
    near: float  # bytes, where a cache holds them
    call: float

    def seconds(self, work: Work) -> float:
        """How long this takes."""
        moving = (work.bytes - work.near) / self.bytes + work.near / self.near
        return work.flops / self.flops + moving + work.calls * self.call


CORE = Rates(flops=180e9, bytes=25e9, near=80e9, call=2e-6)  # measured by tests/benchmarks/costs.py, in float32
ACCELERATOR = Rates(flops=2e13, bytes=1e12, near=1e12, call=6e-6)


@dataclass(frozen=True)
class Cost:
    """Of one call of a site: floating-point operations, bytes read and written, operators, estimated seconds."""

    flops: int
    bytes: int
    calls: int
    seconds: float


Sizes = tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]
"""The sizes of every term's tensors, by role."""


Lookup = Callable[[int, str, str], torch.Tensor]
"""(position, site, role) -> a tensor of the sizes that the active adapter's has there."""


CHOOSABLE = ("linear", "conv1d")  # kinds of site at which there is a choice


@dataclass(frozen=True)
class Choice:
    """The sites whose W' is computed in every call, and those where it is computed once; the rest are pushed through.

    `frozen` says that nothing trains, so that other pieces are kept too.
    """

    dense: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()
    frozen: bool = False


def choose(structure: Structure, sizes: Sequence[Sizes], tokens: int, *, training: bool, frozen: bool) -> Choice:
    """The cheapest lowering of every site, whose tensors have these sizes, for a call of so many tokens.

    `training` says that gradients are wanted, `frozen` that no adapter can get one.
    """
    found: dict[Lowering, set[str]] = {each: set() for each in LOWERINGS}
    for adapted, own in zip(structure.sites, sizes, strict=True):
        best = cheapest(anonymous(adapted), own, typical(tokens), training=training, frozen=frozen)
        found[best].add(adapted.site.name)
    return Choice(frozenset(found["dense"]), frozenset(found["kept"]), frozen)


def typical(tokens: int) -> int:
    """The number of tokens that a choice is made for: all between two powers of two share one."""
    return max(1, 3 * 2 ** max(0, tokens.bit_length() - 1) // 2)


def anonymous(adapted: AdaptedSite) -> AdaptedSite:
    """The site under no name of its own, so that sites that are alike are equal."""
    return replace(adapted, site=replace(adapted.site, module="site", tied=(), output=False))


@lru_cache(maxsize=4096)
def cheapest(adapted: AdaptedSite, sizes: Sizes, tokens: int, *, training: bool, frozen: bool) -> Lowering:
    """The cheapest lowering of a site for so many tokens."""
    costs = alternatives(adapted, sizes, tokens, training=training, frozen=frozen)
    return min(costs, key=lambda each: costs[each].seconds)


def alternatives(
    adapted: AdaptedSite, sizes: Sizes, tokens: int, *, training: bool, frozen: bool
) -> dict[Lowering, Cost]:
    """The lowerings that a site may have, with what a call of so many tokens costs.

    W' is computed only where it has the base weight's own precision: what is added to an activation is not rounded. It
    is kept only where the expression has to be computed as a whole matrix anyway, and nothing trains. Where the weight
    is used in a way that no law covers, W' is computed whatever it costs, and kept unless it is a stack of experts.
    Where the base stores its weight packed, W' is neither computed nor kept: that is what it is packed for.
    """
    found: list[Lowering] = ["pushed"]
    if not _has_law(adapted.site):
        found = ["kept" if frozen and adapted.site.count == 1 else "dense"]  # a stack is most of its model
    elif adapted.site.kind != "embedding" and adapted.site.packing is None and not _is_rounded(adapted):
        found.append("kept" if frozen and _counted(adapted, sizes, "pushed").makes_matrix else "dense")
    return {each: estimate(adapted, sizes, tokens, each, training=training, frozen=frozen) for each in found}


def rates_of(device: torch.device) -> Rates:
    """What a device does in a second; of the CPU, all the threads that torch may use."""
    if device.type != "cpu":
        return ACCELERATOR
    threads = torch.get_num_threads()
    return Rates(CORE.flops * threads, CORE.bytes * threads, CORE.near * threads, CORE.call)


def estimate(
    adapted: AdaptedSite, sizes: Sizes, tokens: int, lowering: Lowering, *, training: bool, frozen: bool
) -> Cost:
    """The cost of one call with so many tokens, the base's operator included, and of its gradients if it trains."""
    counted = _counted(adapted, sizes, lowering)
    work = counted.fresh.of(tokens)
    if not (frozen and lowering != "dense"):
        work += counted.fixed
    if training:  # by the time of its gradient, what an operator read has left the caches
        work = replace(work + counted.gradients.of(tokens), near=0)
    return Cost(work.flops, work.bytes, work.calls, rates_of(adapted.site.device).seconds(work))


@dataclass(frozen=True)
class _Even:
    """Work that grows evenly with the tokens."""

    once: Work
    each: Work

    def of(self, tokens: int) -> Work:
        return self.once + self.each * tokens


@dataclass(frozen=True)
class _Counted:
    """The work of a call: what an activation goes into, what only weights and parameters go into, the gradients."""

    fresh: _Even
    fixed: Work
    gradients: _Even
    makes_matrix: bool  # one of the weight's size that a call reads


@lru_cache(maxsize=1024)
def _counted(adapted: AdaptedSite, sizes: Sizes, lowering: Lowering) -> _Counted:
    graph = _lowered(adapted, sizes, lowering)
    kept, trained = kept_nodes(graph), trained_nodes(graph)
    calls = [node for node in graph.nodes if node.op == "call_function"]
    whole = adapted.site.out_features * adapted.site.in_features
    roots = (each for each in kept if any(user not in kept for user in each.users))
    return _Counted(
        fresh=_even(forward_work(node) for node in calls if node not in kept),
        fixed=sum((forward_work(node) for node in calls if node in kept), Work()),
        gradients=_even(backward_work(node, trained) for node in graph.nodes),
        makes_matrix=any(each.meta["val"].numel() >= whole for each in roots),
    )


_MANY = 2**42
"""Tokens, while work is counted: more than any operator does for the weights alone, so that `divmod` parts the two."""


def _even(works: Iterable[Work]) -> _Even:
    once, each = Work(), Work()
    for work in works:
        flops, moved = divmod(work.flops, _MANY), divmod(work.bytes, _MANY)
        once += Work(flops[1], moved[1], work.calls, work.near)
        each += Work(flops[0], moved[0])
    return _Even(once, each)


def _has_law(site: Site) -> bool:
    return site.kind in ("linear", "conv1d", "embedding") and site.count == 1


def _is_rounded(adapted: AdaptedSite) -> bool:
    """Whether an adapter computes with more digits than the base has."""
    kinds = (role.dtype for term in adapted.terms for role in term.roles if role.dtype.is_floating_point)
    return any(torch.promote_types(each, adapted.site.dtype) != adapted.site.dtype for each in kinds)


def _lowered(adapted: AdaptedSite, sizes: Sizes, lowering: Lowering) -> fx.Graph:
    """The graph of one site alone, with so lowered an adapter in it."""
    known = {
        (term.position, name): shape for term, roles in zip(adapted.terms, sizes, strict=True) for name, shape in roles
    }
    kinds = {(term.position, role.name): role.dtype for term in adapted.terms for role in term.roles}

    def slot_value(position: int, _: str, role: str, near: fx.Node) -> torch.Tensor:
        return fake_like(known.get((position, role), ()), kinds.get((position, role), adapted.site.dtype), near)

    if not _has_law(adapted.site):  # a bias costs next to nothing, and what is there in place of the operator has none
        adapted = replace(adapted, terms=tuple(replace(each, bias=None) for each in adapted.terms))
    graph = _base(adapted.site)
    dense = frozenset({adapted.site.name}) if lowering != "pushed" else frozenset[str]()
    InsertDelta(Structure((adapted,)), slot_value, training=False, dense=dense).run(graph)
    FuseLowRank().run(graph)
    graph.eliminate_dead_code()
    return graph


def _base(site: Site) -> fx.Graph:
    """The one operator that uses the site's weight. Where that is unknown, it is one that costs nothing."""
    graph = fx.Graph()
    kind: dict[str, Any] = {"dtype": site.dtype, "device": site.device}
    with FakeTensorMode():
        sizes = (site.in_features, site.out_features) if site.transposed else (site.out_features, site.in_features)
        stored = torch.empty((site.count, *sizes) if site.count > 1 else sizes, **kind)
        bias = torch.empty(site.out_features, **kind)
        is_index = site.kind == "embedding"
        x = torch.empty(_MANY, dtype=torch.int64) if is_index else torch.empty(_MANY, site.in_features, **kind)

        def node(made: fx.Node, value: torch.Tensor) -> fx.Node:
            made.meta["val"] = value
            return made

        activation, weight = node(graph.placeholder("x"), x), node(graph.get_attr(site.weight), stored)
        op: Any = aten.linear.default
        match site.kind:
            case _ if not _has_law(site):
                op, arguments = aten.detach.default, [weight]
            case "embedding":
                op, arguments = aten.embedding.default, [weight, activation]
            case _ if site.packing is not None:
                op, arguments = QUANTIZED_LINEAR, [activation, weight, node(graph.get_attr(site.bias), bias)]
            case "conv1d":
                op, arguments = aten.addmm.default, [node(graph.get_attr(site.bias), bias), activation, weight]
            case _ if site.has_bias:
                arguments = [activation, weight, node(graph.get_attr(site.bias), bias)]
            case _:
                arguments = [activation, weight]
        used = node(graph.call_function(op, tuple(arguments)), op(*(each.meta["val"] for each in arguments)))
    used.meta["nn_module_stack"] = {"site": (site.module, "")}
    graph.output((used,))
    return graph


def all_sizes(structure: Structure, lookup: Lookup) -> tuple[Sizes, ...]:
    """The sizes of every site's tensors, in the structure's order."""
    return tuple(sizes_of(adapted, lookup) for adapted in structure.sites)


def sizes_of(adapted: AdaptedSite, lookup: Lookup) -> Sizes:
    """The sizes of a site's tensors, by term and role."""
    return tuple(
        tuple((role.name, tuple(lookup(term.position, adapted.site.name, role.name).shape)) for role in term.roles)
        for term in adapted.terms
    )
