"""What an operator becomes where what it reads of an adapter is each row's own: a few laws, whatever the method."""

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.infer import is_same_size
from peftc.passes.ir.row_order import has_rows_first

aten = torch.ops.aten

ELEMENTWISE = frozenset(
    (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.where.self, aten.masked_fill.Tensor)
)


class UnroutedError(Exception):
    """An operator cannot be given each row's own; `reason` says why, `site` where."""

    def __init__(self, node: fx.Node, reason: str):
        self.site = site_of(node)
        self.reason = reason
        super().__init__(reason)


class DisorderError(UnroutedError):
    """What an adapter meets is not the rows in their order, wherever it is looked at."""


class RowValues(Protocol):
    """Where the rows of a call find what is each one's own in the place of nodes of one adapter."""

    @property
    def batch(self) -> int | torch.SymInt:
        """How many rows there are."""
        ...

    def rows(self, emit: Emit) -> fx.Node:
        """How many rows there are, as a node."""
        ...

    def own(self, emit: Emit, node: fx.Node) -> fx.Node:
        """Each row's value of a node, `[rows, ..]`."""
        ...

    def matrix(self, emit: Emit, node: fx.Node) -> fx.Node:
        """Each row's value of a node that is a weight `[out, in]`, turned: `[rows, in, out]`."""
        ...

    def tables(self, emit: Emit, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | int]:
        """The values of all adapters, `[adapters, n, ..]`, which of them each row has, and `n`."""
        ...


@dataclass
class Router:
    """Lets the readers of `nodes` read each row's own instead: see `RowValues`."""

    graph: fx.Graph
    values: RowValues
    nodes: Collection[fx.Node]
    bound: bool = False  # to modules that are called with other things than rows, too, and to be trained
    _apart: dict[fx.Node, fx.Node] = field(default_factory=dict)  # what has rows and another axis in one -> as two

    def rewrite(self, node: fx.Node) -> bool:
        """Let a node read each row's own. Returns whether it has the sizes it had."""
        args: tuple[Any, ...] = node.args
        made = self._law(node)(self._emit(node), node, *args)
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)
        return _has_sizes(made, node)

    def _law(self, node: fx.Node) -> "Law":
        match node.target:
            case each if each in ELEMENTWISE:
                return self._elementwise
            case aten.linear.default:
                return self._linear
            case aten.matmul.default | aten.mm.default:
                return self._matmul
            case aten.addmm.default:
                return self._addmm
            case aten.einsum.default:
                return self._einsum
            case aten.embedding.default:
                return self._embedding
            case aten.index_select.default:
                return self._index_select
            case aten.searchsorted.Tensor:
                return self._searchsorted
            case aten.index.Tensor:
                return self._index
            case aten.index_add.default:
                return self._index_add
            case aten.expand.default:
                return self._expand
            case aten.repeat.default:
                return self._repeat
            case aten.layer_norm.default:
                return self._layer_norm
            case aten.sym_size.int:
                return lambda _, of, value, axis: self._shape(value)[axis]
        raise UnroutedError(node, f"{node.target} has no form in which each row has an adapter of its own")

    # f(x, v) = f(x, v[row]) with v's axes at the end
    def _elementwise(self, emit: Emit, node: fx.Node, *operands: Any) -> fx.Node:
        shape = node.meta["val"].shape
        folded = self._is_folded(node, shape[0] if shape else 1)
        axes = len(shape) + folded
        args = [self._aligned(emit, each, shape, axes, folded) for each in operands]
        made = emit.call(_operator(node), *args, **node.kwargs)
        return self._refolded(emit, made) if folded else made

    # linear(x, W, b) = x @ W[row]^T + b[row]
    def _linear(self, emit: Emit, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> fx.Node:
        if weight in self.nodes:
            made = self._product(emit, node, x, self.values.matrix(emit, weight))
        else:
            made = emit.call(aten.linear.default, x, weight)
        return made if bias is None else self._plus(emit, made, bias, node)

    # x @ M = x @ M[row]
    def _matmul(self, emit: Emit, node: fx.Node, x: fx.Node, matrix: fx.Node) -> fx.Node:
        if x in self.nodes or len(self._shape(matrix)) != 2:
            raise UnroutedError(node, "an adapter's matrix meets the activation from the left")
        return self._product(emit, node, x, self.values.own(emit, matrix))

    # b + x @ M = b[row] + x @ M[row]
    def _addmm(self, emit: Emit, node: fx.Node, bias: fx.Node, x: fx.Node, matrix: fx.Node) -> fx.Node:
        if x in self.nodes or node.kwargs:
            raise UnroutedError(node, "an adapter's matrix meets the activation from the left")
        is_own = matrix in self.nodes
        made = (
            self._product(emit, node, x, self.values.own(emit, matrix))
            if is_own
            else emit.call(aten.mm.default, x, matrix)
        )
        return self._plus(emit, made, bias, node)

    # einsum("...i,j->...k", x, v) = einsum("rs i, r j -> rs k", x, v[row])
    def _einsum(self, emit: Emit, node: fx.Node, equation: str, operands: Sequence[fx.Node]) -> fx.Node:
        taken, given = equation.replace(" ", "").split("->")
        first, _, second = taken.partition(",")
        x, *rest = operands
        if not first.startswith("...") or not given.startswith("...") or x in self.nodes or len(rest) != 1:
            raise UnroutedError(node, f"einsum {equation!r} is not of one activation and one of an adapter's")
        shape = x.meta["val"].shape
        folded = self._is_folded(node, shape[0])
        lead = len(shape) - len(first) + 3 + folded
        x = self._unfolded(emit, x) if folded else x
        letters = "RSTUVW"[:lead]
        text = f"{letters}{first[3:]},{letters[0]}{second}->{letters}{given[3:]}"
        made = emit.call(aten.einsum.default, text, [x, self.values.own(emit, rest[0])])
        return self._refolded(emit, made) if folded else made

    # embedding(V, i) = embedding(all of V, i + row * length); its options are about gradients
    def _embedding(self, emit: Emit, node: fx.Node, table: fx.Node, ids: fx.Node, *options: object) -> fx.Node:
        shape = ids.meta["val"].shape
        if table not in self.nodes or ids in self.nodes or (shape and self._is_folded(node, shape[0])):
            raise UnroutedError(node, "the adapters look up places of their own")
        found = emit.call(aten.embedding.default, *self._places(emit, table, ids))
        padding = options[0] if options and self.bound else -1
        if not isinstance(padding, int) or padding < 0:
            return found
        # What is found for padding sends no gradient back.
        is_padding = emit.call(aten.unsqueeze.default, emit.call(aten.eq.Scalar, ids, padding), -1)
        return emit.call(aten.where.self, is_padding, emit.call(aten.detach.default, found), found)

    # select(V, 0, i) = select(all of V, 0, i + row * length), i one for each row
    def _index_select(self, emit: Emit, node: fx.Node, table: fx.Node, axis: int, ids: fx.Node) -> fx.Node:
        if table not in self.nodes or ids in self.nodes or axis != 0 or not self._is_batch(ids.meta["val"].shape[0]):
            raise UnroutedError(node, "what is looked up is not one place for each row")
        whole, places = self._places(emit, table, ids)
        return emit.call(aten.index_select.default, whole, 0, places)

    # searchsorted(v, i) = searchsorted(v[row], i)
    def _searchsorted(self, emit: Emit, node: fx.Node, ids: fx.Node, found: fx.Node) -> fx.Node:
        self._check_tokens(node, ids, found)
        return emit.call(aten.searchsorted.Tensor, self.values.own(emit, ids), found, **node.kwargs)

    # v[i] = v[row, i]
    def _index(self, emit: Emit, node: fx.Node, ids: fx.Node, places: Sequence[fx.Node]) -> fx.Node:
        (place,) = places
        self._check_tokens(node, ids, place)
        return emit.call(aten.gather.default, self.values.own(emit, ids), 1, place)

    # index_add(x, -1, i, d) = x with each row's d added at its own i; what only fills up is zero, wherever it is added
    def _index_add(self, emit: Emit, node: fx.Node, x: fx.Node, axis: int, ids: fx.Node, added: fx.Node) -> fx.Node:
        shape = x.meta["val"].shape
        if ids not in self.nodes or x in self.nodes or added in self.nodes or axis != -1 or node.kwargs:
            raise UnroutedError(node, "it adds at places of its own")
        own = emit.call(aten.clamp.default, self.values.own(emit, ids), None, int(shape[-1]) - 1)
        for _ in shape[2:]:
            own = emit.call(aten.unsqueeze.default, own, 1)
        return emit.call(aten.scatter_add.default, x, -1, emit.call(aten.expand_as.default, own, added), added)

    def _check_tokens(self, node: fx.Node, ids: fx.Node, found: fx.Node) -> None:
        shape = found.meta["val"].shape
        if ids not in self.nodes or found in self.nodes or len(shape) != 2 or not self._is_batch(shape[0]):
            raise UnroutedError(node, "what is looked for is not a row of tokens for each")

    def _places(self, emit: Emit, table: fx.Node, ids: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The tables of all adapters as one, and where in it each row's are."""
        tables, chosen, length = self.values.tables(emit, table)
        whole = emit.call(aten.flatten.using_ints, tables, 0, 1)
        start = emit.call(aten.mul.Tensor, chosen, length)
        for _ in ids.meta["val"].shape[1:]:
            start = emit.call(aten.unsqueeze.default, start, -1)
        return whole, emit.call(aten.add.Tensor, ids, start)

    # expand(v of 1, rows) = v[row]
    def _expand(self, emit: Emit, node: fx.Node, value: fx.Node, stretched: Sequence[Any]) -> fx.Node:
        rows, *sizes = stretched
        if self._shape(value)[0] != 1 or not self._is_rows(rows):
            raise UnroutedError(node, "it is stretched over something else than rows")
        own = emit.call(aten.squeeze.dim, self.values.own(emit, value), 1)
        return emit.call(aten.expand.default, own, [-1, *sizes]) if any(each != -1 for each in sizes) else own

    # repeat(v, rows) = v[row], rows and v's first axis as one
    def _repeat(self, emit: Emit, node: fx.Node, value: fx.Node, times: Sequence[Any]) -> fx.Node:
        rows, *more = times
        if not self._is_rows(rows) or any(each != 1 for each in more):
            raise UnroutedError(node, "it is repeated over something else than rows")
        return emit.call(aten.flatten.using_ints, self.values.own(emit, value), 0, 1)

    # layer_norm(x, w, b) = w[row] * layer_norm(x) + b[row]
    def _layer_norm(
        self,
        emit: Emit,
        node: fx.Node,
        x: fx.Node,
        sizes: Sequence[int],
        weight: fx.Node | None = None,
        bias: fx.Node | None = None,
        *more: Any,
    ) -> fx.Node:
        made = emit.call(aten.layer_norm.default, x, sizes, None, None, *more)
        if weight is not None:
            made = self._combined(emit, aten.mul.Tensor, made, weight, node)
        return made if bias is None else self._plus(emit, made, bias, node)

    def _plus(self, emit: Emit, made: fx.Node, bias: fx.Node, node: fx.Node) -> fx.Node:
        return self._combined(emit, aten.add.Tensor, made, bias, node)

    def _combined(self, emit: Emit, op: Any, made: fx.Node, other: fx.Node, node: fx.Node) -> fx.Node:
        if other not in self.nodes:
            return emit.call(op, made, other)
        shape = made.meta["val"].shape
        folded = self._is_folded(node, shape[0])
        args = [self._aligned(emit, each, shape, len(shape) + folded, folded) for each in (made, other)]
        total = emit.call(op, *args)
        return self._refolded(emit, total) if folded else total

    def _product(self, emit: Emit, node: fx.Node, x: fx.Node, matrix: fx.Node) -> fx.Node:
        """`x` `[rows, .., in]` times each row's `[rows, in, out]`."""
        shape = x.meta["val"].shape
        if self.bound and not (self._is_batch(shape[0]) or self._is_folded(node, shape[0])):
            raise UnroutedError(node, "it is one for all rows")
        if self.bound and not has_rows_first(x, self.values.batch):
            raise DisorderError(node, "its first axis is not the rows in their order")
        folded = self._is_folded(node, shape[0])
        x = self._unfolded(emit, x) if folded else x
        axes = x.meta["val"].dim()
        if axes == 2:
            made = emit.call(aten.matmul.default, emit.call(aten.unsqueeze.default, x, 1), matrix)
            return emit.call(aten.squeeze.dim, made, 1)
        for _ in range(axes - 3):
            matrix = emit.call(aten.unsqueeze.default, matrix, 1)
        product = aten.bmm.default if axes == 3 else aten.matmul.default
        made = emit.call(product, x, matrix)
        return self._refolded(emit, made) if folded else made

    def _aligned(self, emit: Emit, value: Any, shape: torch.Size, axes: int, folded: bool) -> Any:
        """An operand: each row's own with its axes at the end, or what was there, its rows apart."""
        if not isinstance(value, fx.Node):
            return value
        if value not in self.nodes:
            has_rows = value.meta["val"].dim() == len(shape) and folded and value.meta["val"].shape[0] == shape[0]
            return self._unfolded(emit, value) if has_rows else value
        own = self._shape(value)
        made = self.values.own(emit, value)
        if len(own) == len(shape):
            if own[0] != 1:
                raise UnroutedError(value, "its first axis is not the rows'")
            made = emit.call(aten.squeeze.dim, made, 1)
        for _ in range(axes - made.meta["val"].dim()):
            made = emit.call(aten.unsqueeze.default, made, 1)
        return made

    def _unfolded(self, emit: Emit, x: fx.Node) -> fx.Node:
        """`[rows * n, ..]` as `[rows, n, ..]`."""
        if x not in self._apart:
            rows = self.values.rows(emit)
            whole = emit.call(aten.sym_size.int, x, 0)
            sizes = [rows, emit.call(operator.floordiv, whole, rows)]
            sizes += [emit.call(aten.sym_size.int, x, axis) for axis in range(1, x.meta["val"].dim())]
            return emit.call(aten.reshape.default, x, sizes)
        return self._apart[x]

    def _refolded(self, emit: Emit, made: fx.Node) -> fx.Node:
        """`[rows, n, ..]` as `[rows * n, ..]`."""
        folded = emit.call(aten.flatten.using_ints, made, 0, 1)
        self._apart[folded] = made
        return folded

    def _is_folded(self, node: fx.Node, size: int | torch.SymInt) -> bool:
        """Whether the first axis is rows and another in one; it may not be anything else but rows, or one for all."""
        if self._is_batch(size) or size == 1:
            return False
        if isinstance(size, torch.SymInt) and size.node.expr.is_Mul and self._batch in size.node.expr.args:
            return True
        if isinstance(size, int) and isinstance(self.values.batch, int) and size % self.values.batch == 0:
            return True
        raise UnroutedError(node, f"the first axis, of size {size}, is not the rows of the call")

    def _is_rows(self, size: Any) -> bool:
        return isinstance(size, fx.Node) and self._is_batch(size.meta["val"])

    def _is_batch(self, size: Any) -> bool:
        if isinstance(size, torch.SymInt):
            return bool(size.node.expr == self._batch)
        return isinstance(self.values.batch, int) and bool(size == self.values.batch)

    @property
    def _batch(self) -> Any:
        batch = self.values.batch
        return batch.node.expr if isinstance(batch, torch.SymInt) else batch

    def _shape(self, node: Any) -> torch.Size:
        """The sizes of one adapter's value."""
        shape: torch.Size = node.meta["val"].shape
        return shape

    def _emit(self, node: fx.Node) -> Emit:
        return Emit(self.graph, node, Origin("route", site_of(node)), like=node)


Law = Callable[..., Any]
"""Emits what a node becomes, from the node and its arguments."""


def _has_sizes(made: Any, node: fx.Node) -> bool:
    """Whether a node, or a number, is of the size of another."""
    if not isinstance(made, fx.Node):
        return True
    shapes = [each.meta["val"].shape for each in (made, node)]
    return all(map(is_same_size, *shapes))


def _operator(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target


def site_of(node: fx.Node) -> str:
    """Whose node it is, if it is an adapter's."""
    origin = node.meta.get("peftc")
    return origin.site if isinstance(origin, Origin) else ""
