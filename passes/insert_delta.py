"""Puts the active adapters' weight expressions into a graph."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from peftc.grammar import algebra
from peftc.passes.apply import Activation, Apply, Dense, OneHot, compose, deltas, renamed
from peftc.passes.driver import Change, Miss
from peftc.passes.emit import Emit, Origin
from peftc.passes.materialise import to_logical, to_stored, unstack
from peftc.passes.owners import module_path
from peftc.passes.site import Site
from peftc.passes.structure import AdaptedSite, Structure, Term, site_slot

aten = torch.ops.aten

SlotValue = Callable[[int, str, str, fx.Node], torch.Tensor]
"""(position, site, role or scalar, a node of the graph) -> a fake tensor like the one the slot will hold."""


@dataclass(frozen=True)
class Binding:
    """A use of a site's weight that an activation can be pushed through."""

    use: fx.Node
    x: Activation


@dataclass(frozen=True)
class InsertDelta:
    """linear(x, W, b)  ->  apply(W', x) + b

    Where the weight is used in a way no law covers, the weight itself is replaced: f(W) -> f(W').
    """

    structure: Structure
    slot_value: SlotValue
    training: bool
    name: ClassVar[str] = "insert-delta"

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite every use of every planned site. Raises DropoutError where dropout cannot be honoured."""
        weights: dict[str, list[fx.Node]] = {}
        for node in graph.find_nodes(op="get_attr"):
            weights.setdefault(str(node.target), []).append(node)
        made = 0
        for adapted in self.structure.sites:
            for weight in weights.get(adapted.site.weight, ()):
                made += self._adapt(graph, weight, adapted)
        return Change(made=made)

    def legal(self, node: fx.Node) -> bool:
        """Anything the cleaned trace holds."""
        return True

    def check(self, use: fx.Node, weight: fx.Node, site: Site) -> Binding | Miss:
        """How a node uses the weight."""
        match use.target:
            case aten.linear.default if use.args[1] is weight and site.kind == "linear":
                return Binding(use, Dense(_node(use.args[0])))
            case aten.addmm.default if use.args[2] is weight and site.kind == "conv1d" and not use.kwargs:
                return Binding(use, Dense(_node(use.args[1])))
            case aten.embedding.default if use.args[0] is weight and site.kind == "embedding":
                return Binding(use, OneHot(_node(use.args[1]), tuple(use.args[2:])))
            case _:
                return Miss(f"the weight is used by {use.target}", use)

    def _adapt(self, graph: fx.Graph, weight: fx.Node, adapted: AdaptedSite) -> int:
        ours = [user for user in weight.users if "peftc" not in user.meta and not _is_adapted(user, adapted.site)]
        # A functional use by another module is not this site's: PEFT reaches what the named module computes.
        uses = [user for user in ours if adapted.site.kind == "parameter" or adapted.site.module in module_path(user)]
        made = 0
        replaced: fx.Node | None = None
        for use in uses:
            found = self.check(use, weight, adapted.site)
            matrix = compose(tuple(renamed(term.weight, _prefix(term)) for term in adapted.terms))
            parts = deltas(matrix)
            if isinstance(found, Binding) and parts is not None:
                made += self._add(graph, found, weight, parts, adapted)
                continue
            _refuse_dropout(matrix, found, adapted.site, self.training)
            if replaced is None:
                replaced, count = self._replace(graph, weight, matrix, adapted)
                made += count
            use.replace_input_with(weight, replaced)
        return made

    def _add(
        self,
        graph: fx.Graph,
        found: Binding,
        weight: fx.Node,
        parts: tuple[algebra.Matrix, ...],
        adapted: AdaptedSite,
    ) -> int:
        emit = Emit(graph, found.use.next, Origin(self.name, adapted.site.name), like=found.use)
        apply = self._apply(emit, weight, adapted)
        total = found.use
        for part in parts:
            total = emit.call(aten.add.Tensor, total, apply(part, found.x))
        total = apply.cast(total, found.use.meta["val"].dtype)
        found.use.replace_all_uses_with(total, delete_user_cb=lambda user: user not in emit.made)
        return len(emit.made)

    def _replace(
        self, graph: fx.Graph, weight: fx.Node, matrix: algebra.Matrix, adapted: AdaptedSite
    ) -> tuple[fx.Node, int]:
        emit = Emit(graph, weight.next, Origin(self.name, adapted.site.name), like=next(iter(weight.users)))
        apply = self._apply(emit, weight, adapted)
        value = apply.cast(apply.value(matrix), weight.meta["val"].dtype)
        return to_stored(emit, value, adapted.site), len(emit.made)

    def _apply(self, emit: Emit, weight: fx.Node, adapted: AdaptedSite) -> Apply:
        params: dict[str, fx.Node] = {}
        scalars: dict[str, fx.Node] = {}
        for term in adapted.terms:
            slot = site_slot(term.position, adapted.site.name)
            for role in term.roles:
                value = self.slot_value(term.position, adapted.site.name, role.name, weight)
                node = emit.slot(f"{slot}.{role.name}", value, term.position, role.name)
                sizes = (int(value.shape[0]), int(value.shape[1]))
                params[_prefix(term) + role.name] = unstack(emit, node, role.stacked_axis, sizes, adapted.site)
            for scalar in term.scalars:
                value = self.slot_value(term.position, adapted.site.name, scalar, weight)
                scalars[_prefix(term) + scalar] = emit.slot(f"{slot}.{scalar}", value, term.position, scalar)
        return Apply(emit, params, scalars, lambda: to_logical(emit, weight, adapted.site), self.training)


class DropoutError(Exception):
    """A site's weight is used in a way that leaves no activation to drop."""

    def __init__(self, site: Site, reason: str):
        self.site, self.reason = site, reason
        super().__init__(f"{site.name}: {reason}")


def _refuse_dropout(matrix: algebra.Matrix, found: Binding | Miss, site: Site, training: bool) -> None:
    if training and any(isinstance(each, algebra.Dropped) for each in algebra.walk(matrix)):
        reason = found.reason if isinstance(found, Miss) else "the expression needs the weight's value"
        raise DropoutError(site, reason)


def _is_adapted(use: fx.Node, site: Site) -> bool:
    return any(isinstance(o := user.meta.get("peftc"), Origin) and o.site == site.name for user in use.users)


def _prefix(term: Term) -> str:
    return f"{term.position}:"


def _node(argument: object) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument
