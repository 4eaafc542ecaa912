"""Whether a place has what dropout needs, before there is a graph: laws are followed, and no node is made."""

from collections import defaultdict

import torch
from torch import fx

from peftc.grammar.algebra import algebra
from peftc.passes.expression.apply import Apply, Dense, OneHot, deltas
from peftc.passes.expression.convolve import CONVOLUTIONS, Convolve, Patches
from peftc.passes.expression.materialise import Evaluator
from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.plan.plan import PlannedSite
from peftc.passes.plan.structure import weighted


def check_dropout(at: PlannedSite) -> None:
    """Raise DropoutError where no activation meets what an adapter drops from, at any place of this kind.

    A model can use the weight in another way than its kind has it, which only a graph tells.
    """
    site, bound = at.site, at.bound
    if not any(isinstance(each, algebra.Dropped) for each in algebra.walk(bound.weight)):
        return
    node = fx.Graph().placeholder("x")
    node.meta["val"] = torch.empty(0)
    sizes = {each.role: each.shape for each in bound.params}
    emit = _Nothing(node.graph, node, Origin("check-dropout", site.name), node)
    values = _NoValues(emit, {}, defaultdict(lambda: node))
    whole = (site.out_features, site.in_features)
    apply = Apply(emit, values, lambda _: node, sizes, whole, site, training=True)
    matrix, _ = weighted(bound.weight, bound.bias)
    parts = deltas(matrix)
    for part in (matrix,) if parts is None else map(apply.whole, parts):
        if site.kernel:
            Convolve(apply)(part, Patches(node, CONVOLUTIONS[0], site.kernel, site.channels, site.groups))
        else:
            apply(part, OneHot(node, ()) if site.kind == "embedding" else Dense(node))


class _Nothing(Emit):
    """Makes no node: whatever is asked for is the one that is there."""

    def call(self, op: object, *args: object, **kwargs: object) -> fx.Node:
        return self.like

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node


class _NoValues(Evaluator[fx.Node]):
    """Whatever an expression's value is, it is that node."""

    def of(self, matrix: algebra.Matrix) -> fx.Node:
        assert isinstance(self.ops, Emit)
        return self.ops.like
