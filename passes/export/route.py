"""Lets every row of a call choose its adapter from a bank.

What depends on adapters alone is computed for each of them, once and for all, and stacked. Where it meets what depends
on the call, the operator is given each row's own: a handful of laws, whatever the method.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from peftc.passes.export.fold import Values, computed, drop_unused, fixed_nodes, frontier
from peftc.passes.export.lift import Lifted, check_unbound, propagate
from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.infer import is_same_size
from peftc.passes.ir.inputs import BATCH, InputSpec
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.roles import Role
from peftc.passes.ir.stages import Stage

aten = torch.ops.aten

ELEMENTWISE = frozenset(
    (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.where.self, aten.masked_fill.Tensor)
)


class UnroutedError(Exception):
    """An operator cannot be given each row's own; `reason` says why, `site` where."""

    def __init__(self, node: fx.Node, reason: str):
        self.site = _site(node)
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Route:
    """f(x, g(A))  ->  f(x, bank[ids]), bank = stack(g(A_1), g(A_2), ...)

    `adapters` are the values of each for the lifted graph's tensors `slots`, by name.
    """

    slots: frozenset[str]
    ids: str
    adapters: tuple[Mapping[str, torch.Tensor], ...] = field(repr=False, compare=False)
    name: ClassVar[str] = "route"
    leaves: ClassVar[Stage] = Stage.CLOSED

    def run(self, lifted: Lifted) -> Change:
        """Rewrite in place. Raises UnroutedError, and BoundError as `check_unbound`."""
        before = set(lifted.graph.nodes)
        slots = lifted.tensors_named(self.slots)
        banks = [{node: each[lifted.names[node]] for node in slots} for each in self.adapters]
        route(lifted, slots, banks, self.ids)
        after = set(lifted.graph.nodes)
        return Change(len(after - before), len(before - after))


def route(lifted: Lifted, slots: frozenset[fx.Node], adapters: Sequence[Values], ids: str) -> None:
    """f(x, g(A))  ->  f(x, bank[ids]), bank = stack(g(A_1), g(A_2), ...)

    `adapters` are the tensors of each by the placeholders `slots`; `ids` names the new input, `[batch]` int64. Raises
    UnroutedError, and BoundError as `check_unbound`.
    """
    wanted = frontier(lifted, slots)
    fixed = fixed_nodes(lifted, slots)
    found = list(computed(lifted, adapters, wanted))
    device = next(iter(lifted.inputs.values())).meta["val"].device
    chosen = lifted.add_input(InputSpec(ids, Role.ADAPTERS, axes=((BATCH,),)), torch.int64, device)
    router = _Router(lifted, chosen)
    for node in wanted:
        values = [each[node] for each in found]
        if any(each.shape != values[0].shape or each.dtype != values[0].dtype for each in values):
            raise UnroutedError(node, "the adapters' tensors are of different sizes")
        if all(torch.equal(each, values[0]) for each in values):
            kept = lifted.add_tensor(f"folded.{node.name}", values[0].contiguous().clone())
            node.replace_all_uses_with(kept, delete_user_cb=lambda user: user not in fixed)
        else:
            if _is_tall(node, [each for each in node.users if each not in fixed]):
                router.turned.add(node)
                values = [each.transpose(0, 1) for each in values]
            router.banks[node] = lifted.add_tensor(f"bank.{node.name}", torch.stack(values))
    users = {user: None for node in router.banks for user in node.users if user not in fixed}
    # What was one for all rows may now be each row's own, and whatever reads it too.
    as_before = [router.rewrite(node) for node in [each for each in lifted.graph.nodes if each in users]]
    drop_unused(lifted)
    if all(as_before):
        check_unbound(lifted)
    else:
        propagate(lifted)


@dataclass
class _Router:
    lifted: Lifted
    ids: fx.Node
    banks: dict[fx.Node, fx.Node] = field(default_factory=dict)
    turned: set[fx.Node] = field(default_factory=set)  # of which the bank has rows for columns
    _own: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def rewrite(self, node: fx.Node) -> bool:
        """Let a node read each row's own. Returns whether it has the sizes it had."""
        args: tuple[Any, ...] = node.args
        made = self._law(node)(self._emit(node), node, *args)
        node.replace_all_uses_with(made)
        self.lifted.graph.erase_node(node)
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
        if weight in self.banks:
            turned = emit.call(aten.transpose.int, self._chosen(emit, weight), -1, -2)
            made = self._product(emit, node, x, turned)
        else:
            made = emit.call(aten.linear.default, x, weight)
        return made if bias is None else self._plus(emit, made, bias, node)

    # x @ M = x @ M[row]
    def _matmul(self, emit: Emit, node: fx.Node, x: fx.Node, matrix: fx.Node) -> fx.Node:
        if x in self.banks or len(self._shape(matrix)) != 2:
            raise UnroutedError(node, "an adapter's matrix meets the activation from the left")
        return self._product(emit, node, x, self._chosen(emit, matrix))

    # b + x @ M = b[row] + x @ M[row]
    def _addmm(self, emit: Emit, node: fx.Node, bias: fx.Node, x: fx.Node, matrix: fx.Node) -> fx.Node:
        if x in self.banks or node.kwargs:
            raise UnroutedError(node, "an adapter's matrix meets the activation from the left")
        is_own = matrix in self.banks
        made = (
            self._product(emit, node, x, self._chosen(emit, matrix))
            if is_own
            else emit.call(aten.mm.default, x, matrix)
        )
        return self._plus(emit, made, bias, node)

    # einsum("...i,j->...k", x, v) = einsum("rs i, r j -> rs k", x, v[row])
    def _einsum(self, emit: Emit, node: fx.Node, equation: str, operands: Sequence[fx.Node]) -> fx.Node:
        taken, given = equation.replace(" ", "").split("->")
        first, _, second = taken.partition(",")
        x, *rest = operands
        if not first.startswith("...") or not given.startswith("...") or x in self.banks or len(rest) != 1:
            raise UnroutedError(node, f"einsum {equation!r} is not of one activation and one of an adapter's")
        shape = x.meta["val"].shape
        folded = self._is_folded(node, shape[0])
        lead = len(shape) - len(first) + 3 + folded
        x = self._unfolded(emit, x) if folded else x
        letters = "RSTUVW"[:lead]
        text = f"{letters}{first[3:]},{letters[0]}{second}->{letters}{given[3:]}"
        made = emit.call(aten.einsum.default, text, [x, self._chosen(emit, rest[0])])
        return self._refolded(emit, made) if folded else made

    # embedding(V, i) = embedding(all of V, i + row * length); its options are about gradients
    def _embedding(self, emit: Emit, node: fx.Node, table: fx.Node, ids: fx.Node, *options: object) -> fx.Node:
        if table not in self.banks or ids in self.banks:
            raise UnroutedError(node, "the adapters look up places of their own")
        return emit.call(aten.embedding.default, *self._places(emit, table, ids))

    # select(V, 0, i) = select(all of V, 0, i + row * length), i one for each row
    def _index_select(self, emit: Emit, node: fx.Node, table: fx.Node, axis: int, ids: fx.Node) -> fx.Node:
        if table not in self.banks or ids in self.banks or axis != 0 or not self._is_batch(ids.meta["val"].shape[0]):
            raise UnroutedError(node, "what is looked up is not one place for each row")
        whole, places = self._places(emit, table, ids)
        return emit.call(aten.index_select.default, whole, 0, places)

    def _places(self, emit: Emit, table: fx.Node, ids: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The tables of all adapters as one, and where in it each row's are."""
        whole = emit.call(aten.flatten.using_ints, self.banks[table], 0, 1)
        start = emit.call(aten.mul.Tensor, self.ids, int(self._shape(table)[0]))
        for _ in ids.meta["val"].shape[1:]:
            start = emit.call(aten.unsqueeze.default, start, -1)
        return whole, emit.call(aten.add.Tensor, ids, start)

    # expand(v of 1, rows) = v[row]
    def _expand(self, emit: Emit, node: fx.Node, value: fx.Node, stretched: Sequence[Any]) -> fx.Node:
        rows, *sizes = stretched
        if self._shape(value)[0] != 1 or not self._is_rows(rows):
            raise UnroutedError(node, "it is stretched over something else than rows")
        own = emit.call(aten.squeeze.dim, self._chosen(emit, value), 1)
        return emit.call(aten.expand.default, own, [-1, *sizes]) if any(each != -1 for each in sizes) else own

    # repeat(v, rows) = v[row], rows and v's first axis as one
    def _repeat(self, emit: Emit, node: fx.Node, value: fx.Node, times: Sequence[Any]) -> fx.Node:
        rows, *more = times
        if not self._is_rows(rows) or any(each != 1 for each in more):
            raise UnroutedError(node, "it is repeated over something else than rows")
        return emit.call(aten.flatten.using_ints, self._chosen(emit, value), 0, 1)

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
        if other not in self.banks:
            return emit.call(op, made, other)
        shape = made.meta["val"].shape
        folded = self._is_folded(node, shape[0])
        args = [self._aligned(emit, each, shape, len(shape) + folded, folded) for each in (made, other)]
        total = emit.call(op, *args)
        return self._refolded(emit, total) if folded else total

    def _product(self, emit: Emit, node: fx.Node, x: fx.Node, matrix: fx.Node) -> fx.Node:
        """`x` `[rows, .., in]` times each row's `[rows, in, out]`."""
        shape = x.meta["val"].shape
        folded = self._is_folded(node, shape[0])
        x = self._unfolded(emit, x) if folded else x
        axes = x.meta["val"].dim()
        if axes == 2:
            made = emit.call(aten.matmul.default, emit.call(aten.unsqueeze.default, x, 1), matrix)
            return emit.call(aten.squeeze.dim, made, 1)
        for _ in range(axes - 3):
            matrix = emit.call(aten.unsqueeze.default, matrix, 1)
        made = emit.call(aten.matmul.default, x, matrix)
        return self._refolded(emit, made) if folded else made

    def _aligned(self, emit: Emit, value: Any, shape: torch.Size, axes: int, folded: bool) -> Any:
        """An operand: each row's own with its axes at the end, or what was there, its rows apart."""
        if not isinstance(value, fx.Node):
            return value
        if value not in self.banks:
            has_rows = value.meta["val"].dim() == len(shape) and folded and value.meta["val"].shape[0] == shape[0]
            return self._unfolded(emit, value) if has_rows else value
        own = self._shape(value)
        made = self._chosen(emit, value)
        if len(own) == len(shape):
            if own[0] != 1:
                raise UnroutedError(value, "its first axis is not the rows'")
            made = emit.call(aten.squeeze.dim, made, 1)
        for _ in range(axes - made.meta["val"].dim()):
            made = emit.call(aten.unsqueeze.default, made, 1)
        return made

    def _chosen(self, emit: Emit, node: fx.Node) -> fx.Node:
        """Each row's own, `[rows, ..]`; chosen once."""
        if node not in self._own:
            first = self._emit(next(each for each in self.lifted.graph.nodes if each.op != "placeholder"))
            own = first.call(aten.index_select.default, self.banks[node], 0, self.ids)
            self._own[node] = first.call(aten.transpose.int, own, 1, 2) if node in self.turned else own
        return self._own[node]

    def _unfolded(self, emit: Emit, x: fx.Node) -> fx.Node:
        """`[rows * n, ..]` as `[rows, n, ..]`."""
        rows = emit.call(aten.sym_size.int, self.ids, 0)
        whole = emit.call(aten.sym_size.int, x, 0)
        sizes = [rows, emit.call(operator.floordiv, whole, rows)]
        sizes += [emit.call(aten.sym_size.int, x, axis) for axis in range(1, x.meta["val"].dim())]
        return emit.call(aten.reshape.default, x, sizes)

    def _refolded(self, emit: Emit, made: fx.Node) -> fx.Node:
        """`[rows, n, ..]` as `[rows * n, ..]`."""
        return emit.call(aten.flatten.using_ints, made, 0, 1)

    def _is_folded(self, node: fx.Node, size: int | torch.SymInt) -> bool:
        """Whether the first axis is rows and another in one; it may not be anything else but rows, or one for all."""
        if self._is_batch(size) or size == 1:
            return False
        if isinstance(size, torch.SymInt) and self._batch in size.node.expr.args:
            return True
        raise UnroutedError(node, f"the first axis, of size {size}, is not the rows of the call")

    def _is_rows(self, size: Any) -> bool:
        return isinstance(size, fx.Node) and self._is_batch(size.meta["val"])

    def _is_batch(self, size: Any) -> bool:
        return isinstance(size, torch.SymInt) and bool(size.node.expr == self._batch)

    @property
    def _batch(self) -> Any:
        return self.lifted.symbols[BATCH].node.expr

    def _shape(self, node: Any) -> torch.Size:
        """The sizes of one adapter's value."""
        shape: torch.Size = node.meta["val"].shape
        return shape

    def _emit(self, node: fx.Node) -> Emit:
        return Emit(self.lifted.graph, node, Origin("route", _site(node)), like=node)


Law = Callable[..., Any]
"""Emits what a node becomes, from the node and its arguments."""


def _is_tall(weight: fx.Node, users: Sequence[fx.Node]) -> bool:
    """Whether it is the weight of linears and has more rows than columns: products of batches are slow over few."""
    shape = weight.meta["val"].shape
    is_weight = all(each.target is aten.linear.default and each.args[1] is weight for each in users)
    return is_weight and len(shape) == 2 and shape[0] > shape[1]


def _has_sizes(made: Any, node: fx.Node) -> bool:
    """Whether a node, or a number, is of the size of another."""
    if not isinstance(made, fx.Node):
        return True
    shapes = [each.meta["val"].shape for each in (made, node)]
    return all(map(is_same_size, *shapes))


def _operator(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target


def _site(node: fx.Node) -> str:
    origin = node.meta.get("peftc")
    return origin.site if isinstance(origin, Origin) else ""
