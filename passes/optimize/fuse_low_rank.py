"""Lets a low-rank term add itself into the base linear's output, for graphs that run as they are."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.pass_manager import Change, Miss
from peftc.passes.ir.stages import Stage
from peftc.passes.plan.structure import float_of
from peftc.passes.quantized.packed_operators import PACKED_LINEAR

aten = torch.ops.aten


@dataclass(frozen=True)
class _Term:
    """`add(base, linear(s * linear(x, A), B))`, taken apart."""

    total: fx.Node
    base: fx.Node
    up: fx.Node
    scaled: fx.Node
    down: fx.Node
    scale: fx.Node


@dataclass(frozen=True)
class FuseLowRank:
    """linear(x, W, b) + linear(s * linear(x, A), B)  ->  addmm_(linear(x, W, b), linear(x, A), B.T, alpha = s)

    In two dimensions, so that nothing is copied: rows are tokens. The base's output has no other reader, so adding into
    it in place is safe, also for gradients (a linear's backward does not need its output).
    """

    name: ClassVar[str] = "fuse-low-rank"
    leaves: ClassVar[Stage] = Stage.FUSED

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        made, misses, rows = 0, list[Miss](), _Rows(graph)
        for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
            term = self.check(node)
            if isinstance(term, _Term):
                made += self._rewrite(graph, term, rows)
            elif isinstance(origin := node.meta.get("peftc"), Origin):
                misses.append(replace(term, site=origin.site))
        graph.eliminate_dead_code()
        return Change(made=made, misses=tuple(misses))

    def check(self, total: fx.Node) -> _Term | Miss:
        """Take an addition apart."""
        base, up = total.args[:2]
        if not (isinstance(base, fx.Node) and isinstance(up, fx.Node)) or total.kwargs:
            return Miss("not a sum of two tensors", total)
        if not isinstance(total.meta.get("peftc"), Origin):
            return Miss("not an adapter's", total)
        if up.target is not aten.linear.default or len(up.args) != 2 or len(up.users) != 1:
            return Miss("the second operand is not a linear of its own", up)
        scaled = up.args[0]
        if not isinstance(scaled, fx.Node) or scaled.target is not aten.mul.Tensor or len(scaled.users) != 1:
            return Miss("the linear's input is not scaled", up)
        down, scale = scaled.args[:2]
        if not (isinstance(down, fx.Node) and isinstance(scale, fx.Node)) or scale.op != "get_attr":
            return Miss("the scale is not a slot", scaled)
        if down.target is not aten.linear.default or len(down.args) != 2:
            return Miss("what is scaled is not a linear", down)
        if len(base.users) != 1 or not _makes_own_output(base):
            return Miss("the base's output is read elsewhere", base)
        if len({each.meta["val"].dtype for each in (base, up, down)}) != 1:
            return Miss("the adapter computes in another type", up)
        return _Term(total, base, up, scaled, down, scale)

    def _rewrite(self, graph: fx.Graph, term: _Term, rows: "_Rows") -> int:
        emit = Emit(graph, term.total, term.total.meta["peftc"], like=term.total)
        base, down = rows.of(term.base), rows.of(term.down)
        weight = emit.call(aten.t.default, term.up.args[1])
        alpha = emit.constant(float_of(str(term.scale.target)), 1.0)
        total = emit.call(aten.addmm_.default, base, down, weight, alpha=alpha)
        shaped = rows.shaped(emit, total, term)
        term.total.replace_all_uses_with(shaped)
        graph.erase_node(term.total)
        return len(emit.made)


@dataclass
class _Rows:
    """Values with all leading axes folded into one, each made once."""

    graph: fx.Graph
    known: dict[fx.Node, fx.Node] = field(default_factory=dict)
    sizes: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict)

    def of(self, node: fx.Node) -> fx.Node:
        """The node's value as `[rows, features]`: a linear is computed so, anything else is reshaped."""
        if node.meta["val"].dim() == 2:
            return node
        if node not in self.known:
            # Right behind the value, so that every reader can share the rows.
            emit = Emit(self.graph, node.next, node.meta.get("peftc") or Origin(FuseLowRank.name), like=node)
            if node.target in (aten.linear.default, PACKED_LINEAR):
                self.known[node] = emit.call(node.target, self.of(_node(node.args[0])), *node.args[1:])
            else:
                self.known[node] = emit.call(aten.reshape.default, node, [-1, int(node.meta["val"].shape[-1])])
        return self.known[node]

    def shaped(self, emit: Emit, rows: fx.Node, term: _Term) -> fx.Node:
        """Rows back in the shape of the term's sum."""
        shape = term.total.meta["val"].shape
        if len(shape) == 2:
            return rows
        x = _node(term.down.args[0])
        leading = [size if isinstance(size, int) else self._size(x, axis) for axis, size in enumerate(shape[:-1])]
        result = emit.call(aten.view.default, rows, [*leading, shape[-1]])
        self.known[result] = rows
        return result

    def _size(self, x: fx.Node, axis: int) -> fx.Node:
        if (x, axis) not in self.sizes:
            emit = Emit(self.graph, x.next, Origin(FuseLowRank.name), like=x)
            self.sizes[x, axis] = emit.call(aten.sym_size.int, x, axis)
        return self.sizes[x, axis]


def _makes_own_output(node: fx.Node) -> bool:
    own = (aten.linear.default, PACKED_LINEAR, aten.addmm.default, aten.addmm_.default)
    shaped = node.target is aten.view.default and isinstance(node.meta.get("peftc"), Origin)
    return node.target in own or shaped


def _node(argument: object) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument
