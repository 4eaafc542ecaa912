"""Puts the active adapters' weight expressions into a graph."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

import torch
from torch import fx

from peftc.grammar.algebra import algebra
from peftc.passes.expression.apply import Activation, Apply, DropoutError, Primes, compose, deltas, renamed
from peftc.passes.expression.convolve import Convolve, Patches, is_low_rank
from peftc.passes.expression.materialise import Evaluator, to_logical, to_stored, unstack
from peftc.passes.insert.gate import gate, is_disordered, misfit, tokens_of, weighed
from peftc.passes.insert.uses import WeightUse, use_of
from peftc.passes.ir.bodies import used_by
from peftc.passes.ir.emit import Emit, Origin, fake_like
from peftc.passes.ir.pass_manager import Change, Miss
from peftc.passes.ir.stages import Stage
from peftc.passes.plan.site import Site
from peftc.passes.plan.structure import GATE, MEMBER, TASK, AdaptedSite, Structure, Term, site_slot, slot_role

aten = torch.ops.aten

SlotValue = Callable[[int, str, str, fx.Node], torch.Tensor]
"""(position, site, role or scalar, a node of the graph) -> a fake tensor like the one the slot will hold."""


@dataclass(frozen=True)
class InsertDelta:
    """linear(x, W, b)  ->  apply(W', x) + b'

    Where the weight is used in a way no law covers, and at the sites of `dense`, the weight itself is replaced:
    f(W, b) -> f(W', b'). So it is at a convolution, unless something has to meet the activation alone.
    Where rows have adapters of their own, y -> where(member, apply(W', x) + b', y) for each lane.
    Where tokens are given more or less of an adapter, y -> y + gate * (apply(W', x) + b' - y).
    """

    structure: Structure
    slot_value: SlotValue
    training: bool
    dense: frozenset[str] = frozenset()
    name: ClassVar[str] = "insert-delta"
    leaves: ClassVar[Stage] = Stage.ADAPTED

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite every use of every planned site. Raises DropoutError where dropout cannot be honoured."""
        weights: dict[str, list[fx.Node]] = {}
        for node in graph.find_nodes(op="get_attr"):
            weights.setdefault(str(node.target), []).append(node)
        made, misses = 0, list[Miss]()
        for adapted in self.structure.sites:
            for weight in weights.get(adapted.site.weight, ()):
                made += self._adapt(graph, weight, adapted, misses)
        return Change(made=made, misses=tuple(misses))

    def check(self, use: fx.Node, weight: fx.Node, site: Site) -> WeightUse | Miss:
        """How a node uses the weight."""
        return use_of(use, weight, site)

    def _adapt(self, graph: fx.Graph, weight: fx.Node, adapted: AdaptedSite, misses: list[Miss]) -> int:
        ours = [user for user in weight.users if "peftc" not in user.meta and not _is_adapted(user, adapted.site)]
        # A functional use by another module is not this site's: PEFT reaches what the named module computes.
        uses = [user for user in ours if adapted.site.kind == "parameter" or adapted.site.user in used_by(user, weight)]
        if adapted.lanes:
            return sum(self._by_row(graph, each, weight, adapted) for each in uses)
        if any(term.position in self.structure.gated for term in adapted.terms):
            return sum(self._by_token(graph, each, weight, adapted) for each in uses)
        terms = [_primes(term) for term in adapted.terms]
        made = 0
        replaced: fx.Node | None = None
        for each in uses:
            found = self.check(each, weight, adapted.site)
            # A module may be given a bias, or lose it, after adapters were planned.
            primes = compose(terms, adapted.site.has_bias if isinstance(found, Miss) else found.bias is not None)
            if isinstance(found, WeightUse) and not self._is_dense(found, primes[0], adapted):
                made += self._rewrite(graph, found, weight, primes, adapted)
                continue
            if isinstance(found, Miss):
                misses.append(replace(found, site=adapted.site.name))
                _refuse_dropout(primes[0], found, adapted.site, self.training)
                if primes[1] is not None:
                    raise UnfitError(adapted.site, f"its bias is adapted, and {found.reason}")
            if replaced is None:
                replaced, count = self._replace(graph, weight, primes[0], adapted)
                made += count
            if isinstance(found, WeightUse):
                made += self._rebase(graph, found, weight, replaced, primes[1], adapted)
            else:
                each.replace_input_with(weight, replaced)
        return made

    def _by_row(self, graph: fx.Graph, node: fx.Node, weight: fx.Node, adapted: AdaptedSite) -> int:
        use = self.check(node, weight, adapted.site)
        if isinstance(use, Miss):
            raise UnfitError(adapted.site, f"rows have adapters of their own, and {use.reason}")
        emit = Emit(graph, use.node.next, Origin(self.name, adapted.site.name), like=use.node)
        total, kind = use.node, use.node.meta["val"].dtype
        for terms in adapted.by_lane():
            primes = compose([_primes(term) for term in terms], use.bias is not None)
            slot = f"{site_slot(terms[0].position, adapted.site.name)}.{MEMBER}"
            member = emit.slot(slot, fake_like((), torch.bool, weight), terms[0].position, MEMBER)
            apply = self._apply(emit, weight, replace(adapted, terms=terms, lanes=()), use)
            made = apply.cast(_total(apply, primes, use, total), kind)
            total = emit.call(aten.where.self, member, made, total)
        use.node.replace_all_uses_with(total, delete_user_cb=lambda user: user not in emit.made)
        return len(emit.made)

    def _by_token(self, graph: fx.Graph, node: fx.Node, weight: fx.Node, adapted: AdaptedSite) -> int:
        use, tokens = self.check(node, weight, adapted.site), tokens_of(graph)
        if tokens is not None and is_disordered(node, tokens):  # else what it is may look as if it were in order
            raise DisorderedError(adapted.site, "its first axes are not the rows and tokens in their order")
        why = "nothing it is called with has rows of tokens" if tokens is None else misfit(node, tokens)
        if isinstance(use, Miss) or tokens is None or why:
            why = use.reason if isinstance(use, Miss) else why
            raise UnfitError(adapted.site, f"how much of it is used differs from token to token, and {why}")
        emit = Emit(graph, use.node.next, Origin(self.name, adapted.site.name), like=use.node)
        total, kind = use.node, use.node.meta["val"].dtype
        gated = [term for term in adapted.terms if term.position in self.structure.gated]
        others = tuple(term for term in adapted.terms if term not in gated)
        if others:
            primes = compose([_primes(term) for term in others], use.bias is not None)
            total = _total(self._apply(emit, weight, replace(adapted, terms=others), use), primes, use, total)
        for term in gated:
            apply = self._apply(emit, weight, replace(adapted, terms=(term,)), use)
            change = _change(apply, compose([_primes(term)], use.bias is not None), use)
            by = gate(emit, tokens, f"{site_slot(term.position, adapted.site.name)}.{GATE}", use.node)
            total = emit.call(aten.add.Tensor, total, weighed(emit, change, by, tokens, use.node))
        total = apply.cast(total, kind)
        use.node.replace_all_uses_with(total, delete_user_cb=lambda user: user not in emit.made)
        return len(emit.made)

    def _is_dense(self, use: WeightUse, matrix: algebra.Matrix, adapted: AdaptedSite) -> bool:
        """Whether to compute W' for the operator that is there, rather than to add to what it gives.

        A second convolution is as dear as the first, unless it is of low rank, and then a gradient for the whole
        weight is dearer. Where dropout or another type keep the parts from meeting `W`, there is no choice.
        """
        drops = self.training and any(isinstance(each, algebra.Dropped) for each in algebra.walk(matrix))
        if drops or not isinstance(use.x, Patches):
            return adapted.site.name in self.dense and not drops
        parts = deltas(matrix)
        thin = parts is not None and use.x.groups == 1 and all(map(is_low_rank, parts))
        kinds = {role.dtype for term in adapted.terms for role in term.roles if role.dtype.is_floating_point}
        return not (self.training and thin) and kinds <= {use.node.meta["val"].dtype}

    def _rebase(
        self,
        graph: fx.Graph,
        use: WeightUse,
        weight: fx.Node,
        replaced: fx.Node,
        bias: algebra.Matrix | None,
        adapted: AdaptedSite,
    ) -> int:
        emit = Emit(graph, use.node, Origin(self.name, adapted.site.name), like=use.node)
        new = None
        if bias is not None:
            apply = self._apply(emit, weight, adapted, use)
            new = apply.cast(apply.value(bias), weight.meta["val"].dtype)
        use.rebase(replaced, new)
        return len(emit.made)

    def _rewrite(self, graph: fx.Graph, use: WeightUse, weight: fx.Node, primes: Primes, adapted: AdaptedSite) -> int:
        emit = Emit(graph, use.node.next, Origin(self.name, adapted.site.name), like=use.node)
        apply = self._apply(emit, weight, adapted, use)
        total = _total(apply, primes, use, use.node)
        total = apply.cast(total, use.node.meta["val"].dtype)
        use.node.replace_all_uses_with(total, delete_user_cb=lambda user: user not in emit.made)
        if not use.node.users:
            graph.erase_node(use.node)
        return len(emit.made)

    def _replace(
        self, graph: fx.Graph, weight: fx.Node, matrix: algebra.Matrix, adapted: AdaptedSite
    ) -> tuple[fx.Node, int]:
        emit = Emit(graph, weight.next, Origin(self.name, adapted.site.name), like=next(iter(weight.users)))
        apply = self._apply(emit, weight, adapted, None)
        value = apply.cast(apply.value(matrix), weight.meta["val"].dtype)
        return to_stored(emit, value, adapted.site), len(emit.made)

    def _apply(self, emit: Emit, weight: fx.Node, adapted: AdaptedSite, use: WeightUse | None) -> Apply:
        site = adapted.site
        params: dict[str, fx.Node] = {}
        scalars: dict[str, fx.Node] = {}
        sizes: dict[str, tuple[int, ...]] = {}
        for term in adapted.terms:
            slot = site_slot(term.position, site.name)
            for role in term.roles:
                name = _prefix(term) + role.name
                value = self.slot_value(term.position, site.name, role.name, weight)
                node = emit.slot(f"{slot}.{slot_role(role.name)}", value, term.position, role.name)
                params[name] = unstack(emit, node, role.stacked_axis, role.shared, site)
                sizes[name] = tuple(params[name].meta["val"].shape[site.lead :])
            for scalar in term.scalars:
                value = self.slot_value(term.position, site.name, scalar, weight)
                scalars[_prefix(term) + scalar] = emit.slot(f"{slot}.{slot_role(scalar)}", value, term.position, scalar)
        bias = use.bias if use is not None else None
        values = Evaluator(
            emit, params, scalars, lead=site.lead, bias=bias, training=self.training, task=_task(emit, weight, adapted)
        )

        def base(x: Activation) -> fx.Node:
            assert use is not None
            return use.base(emit, weight, x)

        apply = Apply(emit, values, base, sizes, (site.out_features, site.in_features), site, self.training)
        values.weight = lambda: to_logical(emit, apply.promoted(weight), site)
        return apply


def _total(apply: Apply, primes: Primes, use: WeightUse, total: fx.Node) -> fx.Node:
    """What the adapted weight and bias give; where they are the base's plus something, `total` plus that."""
    added = _added(apply, primes, use)
    if added is None:
        return _whole(apply, primes, use)
    for each in added:
        total = apply.emit.call(aten.add.Tensor, total, each)
    return total


def _change(apply: Apply, primes: Primes, use: WeightUse) -> fx.Node:
    """What the adapted weight and bias give, less what the base does."""
    added = _added(apply, primes, use)
    if added is None:
        return apply.emit.call(aten.sub.Tensor, _whole(apply, primes, use), use.node)
    return functools.reduce(lambda one, other: apply.emit.call(aten.add.Tensor, one, other), added)


def _added(apply: Apply, primes: Primes, use: WeightUse) -> Iterator[fx.Node] | None:
    """What is added to what the base gives, in parts; None where weight or bias is not the base's plus something."""
    parts = deltas(primes[0])
    added = () if primes[1] is None else deltas(primes[1], algebra.Bias())
    if parts is None or added is None:
        return None
    weights = (_applied(apply, apply.whole(part), use) for part in parts)
    return chain(weights, (_spread(apply, apply.value(part), use) for part in added))


def _whole(apply: Apply, primes: Primes, use: WeightUse) -> fx.Node:
    """What the adapted weight and bias give."""
    total = _applied(apply, primes[0], use)
    bias = use.bias if primes[1] is None else apply.value(primes[1])
    return total if bias is None else apply.emit.call(aten.add.Tensor, total, _spread(apply, bias, use))


def _task(emit: Emit, weight: fx.Node, adapted: AdaptedSite) -> fx.Node | None:
    """The task of a row, read beside the tensors of what first asks for it."""
    term = next((each for each in adapted.terms if each.tasks), None)
    if term is None:
        return None
    slot = f"{site_slot(term.position, adapted.site.name)}.{TASK}"
    return emit.slot(slot, fake_like((1,), torch.int64, weight), term.position, TASK)


def _applied(apply: Apply, matrix: algebra.Matrix, use: WeightUse) -> fx.Node:
    return Convolve(apply)(matrix, use.x) if isinstance(use.x, Patches) else apply(matrix, use.x)


def _spread(apply: Apply, bias: fx.Node, use: WeightUse) -> fx.Node:
    return Convolve(apply).bias(bias, use.x) if isinstance(use.x, Patches) else bias


class UnfitError(Exception):
    """A site is used in a way that its adapter cannot be put in."""

    def __init__(self, site: Site, reason: str):
        self.site, self.reason = site, reason
        super().__init__(f"{site.name}: {reason}")


class DisorderedError(UnfitError):
    """A site is used on rows in another order, wherever it is looked at."""


def _refuse_dropout(matrix: algebra.Matrix, found: Miss, site: Site, training: bool) -> None:
    if training and any(isinstance(each, algebra.Dropped) for each in algebra.walk(matrix)):
        raise DropoutError(site, found.reason)


def _is_adapted(use: fx.Node, site: Site) -> bool:
    return any(isinstance(o := user.meta.get("peftc"), Origin) and o.site == site.name for user in use.users)


def _primes(term: Term) -> Primes:
    weight = renamed(term.weight, _prefix(term))
    return weight, None if term.bias is None else renamed(term.bias, _prefix(term))


def _prefix(term: Term) -> str:
    return f"{term.position}:"
