"""Lets products read the matrices of all adapters as they lie, the rows of each together, in graphs that run as they
are.

Each row's own matrices are best laid out once, for as long as the rows have what they have. Where that changes with
every call, to lay them out costs more than the product at few tokens: rows are moved instead, which are smaller, or a
kernel reads the matrices where they lie.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.stages import Stage
from peftc.passes.route.by_seat import multiplied_by_seat
from peftc.passes.route.laws import site_of
from peftc.passes.route.route_rows import ROUTED

aten = torch.ops.aten

GROUPS = "groups"
"""By this name graphs read how the rows stand to the matrices. `[adapters, most]`, int64: the rows of each adapter,
filled up with any. A number: see the other one. `[0]`: matrices are laid out by row."""

PLACES = "places"
"""And by this one, `[rows]`, int64, where in `GROUPS`, flat, each row stands; where that is a number, its adapter."""


def grouped(x: Tensor, groups: Tensor) -> Tensor:
    """`[rows, n, in]` as `[adapters, most * n, in]`."""
    if groups.dim() < 2:
        return x
    adapters, most = groups.shape
    return x.index_select(0, groups.view(-1)).view(adapters, most * x.shape[1], x.shape[2])


def ungrouped(y: Tensor, groups: Tensor, places: Tensor) -> Tensor:
    """`[adapters, most * n, out]` as `[rows, n, out]`."""
    if groups.dim() < 2:
        return y
    adapters, most = groups.shape
    return y.reshape(adapters * most, y.shape[1] // most, y.shape[2]).index_select(0, places)


def multiplied(h: Tensor, matrix: Tensor, groups: Tensor, places: Tensor) -> Tensor:
    """The product of what is grouped with the matrices."""
    return torch.bmm(h, matrix) if groups.dim() else multiplied_by_seat(h, matrix, places)


def added(base: Tensor, h: Tensor, matrix: Tensor, groups: Tensor, places: Tensor) -> Tensor:
    """`base`, by row, plus the product of what is grouped with the matrices."""
    if groups.dim() == 1:
        return torch.baddbmm(base, h, matrix)
    return base + ungrouped(multiplied(h, matrix, groups, places), groups, places)


def added_(base: Tensor, h: Tensor, matrix: Tensor, groups: Tensor, places: Tensor) -> Tensor:
    """The same, written into `base`."""
    if groups.dim() == 1:
        return base.baddbmm_(h, matrix)
    return base.add_(ungrouped(multiplied(h, matrix, groups, places), groups, places))


_ADDED = {aten.baddbmm.default: added, aten.baddbmm_.default: added_}


@dataclass(frozen=True)
class GroupRows:
    """bmm(x, M[row])  ->  ungrouped(multiplied(grouped(x), M)), which is what it was where matrices are laid out by row

    Products in a row stay grouped. A matrix that is read in another way too is had by row. The names of the others are
    `matrices`.
    """

    name: ClassVar[str] = "group-rows"
    leaves: ClassVar[Stage] = Stage.FUSED
    matrices: set[str] = field(default_factory=set, compare=False)

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        read = {each: list(each.users) for each in graph.find_nodes(op="get_attr") if _is_routed(each)}
        alike = {each: users for each, users in read.items() if all(_is_product(user, each) for user in users)}
        wanted = {user for users in alike.values() for user in users}
        if not wanted or any(each.target == f"{ROUTED}.{GROUPS}" for each in read):
            return Change()
        rows = _Rows(graph, next(node for node in graph.nodes if node in wanted))
        for node in [each for each in graph.nodes if each in wanted]:
            node.replace_all_uses_with(rows.product(node))
            graph.erase_node(node)
        graph.eliminate_dead_code()
        self.matrices.update(str(each.target).rpartition(".")[2] for each in alike)
        return Change(made=len(wanted))


class _Rows:
    """Emits products of what is grouped, and what groups; each activation is grouped once."""

    def __init__(self, graph: fx.Graph, first: fx.Node):
        self._graph = graph
        value = first.meta["val"]
        with value.fake_mode:
            fake = torch.empty(0, dtype=torch.int64, device=value.device)
        emit = Emit(graph, next(each for each in graph.nodes if each.op != "placeholder"), _origin(first), like=first)
        self._groups, self._places = (emit.slot(f"{ROUTED}.{name}", fake) for name in (GROUPS, PLACES))
        self._grouped: dict[fx.Node, fx.Node] = {}

    def product(self, node: fx.Node) -> fx.Node:
        """What a product by row becomes."""
        emit = Emit(self._graph, node, _origin(node), like=node)
        *base, x, matrix = node.args
        assert isinstance(x, fx.Node)
        if x not in self._grouped:
            self._grouped[x] = emit.call(grouped, x, self._groups)
        h = self._grouped[x]
        if base:
            return emit.call(_ADDED[node.target], *base, h, matrix, self._groups, self._places)  # type: ignore[index]
        made = emit.call(multiplied, h, matrix, self._groups, self._places)
        result = emit.call(ungrouped, made, self._groups, self._places)
        self._grouped[result] = made
        return result


def _is_product(user: fx.Node, matrix: fx.Node) -> bool:
    """Whether a node is an activation times a matrix, and maybe added."""
    if user.kwargs or not user.args or user.args[-1] is not matrix:
        return False
    if user.target is aten.matmul.default:
        first: Any = user.args[0]
        return first.meta["val"].dim() == 3 and matrix.meta["val"].dim() == 3
    return user.target is aten.bmm.default or user.target in _ADDED


def _is_routed(node: fx.Node) -> bool:
    return str(node.target).startswith(f"{ROUTED}.")


def _origin(node: fx.Node) -> Origin:
    return Origin(GroupRows.name, site_of(node))
