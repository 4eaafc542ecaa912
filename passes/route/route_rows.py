"""Lets every row of a call have an adapter of its own, for graphs that are bound to live modules."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.stages import Stage
from peftc.passes.ir.values import refresh
from peftc.passes.plan.structure import MEMBER
from peftc.passes.route.laws import Router, UnroutedError, site_of
from peftc.passes.route.vanish import simplify

aten = torch.ops.aten

ROUTED = "routed"
"""Where graphs read what is each row's own."""

IDS = "ids"
SLOTS = ("slots.", "copies.")


@dataclass(frozen=True)
class Piece:
    """What a graph reads, by a name, in the place of one adapter's value: the values of all rows.

    `form` says how they lie: "own" is `[rows, ..]`, "matrix" the same with the last two axes turned, "tables" has those
    of all adapters of the call, `[adapters, ..]`. `index` is which output of the prologue it is made of.
    """

    name: str
    index: int
    form: str
    dtype: torch.dtype


@dataclass(frozen=True)
class LanePieces:
    """What rows have together: the slots it is computed from, the graph that does, the pieces.

    A row whose adapter has not all of the slots has zeros. Where that would not be the base's own value, the lane is
    `guarded`: such a row is given whatever another has, and what comes of it is not looked at. `members` are the names
    of the pieces that say which rows have the lane.
    """

    slots: frozenset[str]
    prologue: fx.Graph
    pieces: tuple[Piece, ...]
    members: tuple[str, ...] = ()

    @property
    def draws(self) -> bool:
        """Whether numbers are drawn for each row, anew in every call."""
        return any(_is_drawn(node) for node in self.prologue.nodes)

    @property
    def guarded(self) -> bool:
        """Whether rows that have not the lane are told apart."""
        return bool(self.members)


@dataclass(frozen=True)
class RouteRows:
    """f(x, g(A))  ->  f(x, piece), piece = stack(g(A_1), g(A_2), ...) with the adapter of each row in its place

    The graphs that compute the pieces of each lane are the change's subject's `lanes`, see `routed`.
    """

    name: ClassVar[str] = "route-rows"
    leaves: ClassVar[Stage] = Stage.BOUND
    lanes: list[LanePieces] = field(default_factory=list, compare=False)

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place. Raises UnroutedError."""
        before = set(graph.nodes)
        prepare(graph)
        fixed = _fixed(graph)
        wanted = [each for each in fixed if any(user not in fixed for user in each.users)]
        if not wanted:
            return Change()
        values = _Pieces(graph, _batch(graph))
        router = Router(graph, values, wanted, bound=True)
        users = {user: None for node in wanted for user in node.users if user not in fixed}
        for node in [each for each in graph.nodes if each in users]:
            router.rewrite(node)
        refresh(graph)
        self.lanes.extend(_lanes(graph, fixed, values))
        graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() and node not in fixed)
        after = set(graph.nodes)
        return Change(len(after - before), len(before - after))


def prepare(graph: fx.Graph, constants: Collection[str] = ()) -> None:
    """Let a graph with lanes read as little as it can of each row's own. Raises UnroutedError.

    `constants` are slots that are one for all rows: what comes of them is not zero where a row has not the lane.
    """
    _scale_up(graph)
    fixed = _fixed(graph, constants)
    for node in graph.find_nodes(op="call_function", target=aten.where.self):
        if node in fixed and node.args[0] in fixed and str(node.args[0].target).endswith(f".{MEMBER}"):
            raise UnroutedError(node, "what is adapted depends on no input")
    simplify(graph, fixed)
    graph.eliminate_dead_code()


@dataclass
class _Pieces:
    """Reads pieces by attributes, which are made as they are asked for."""

    graph: fx.Graph
    batch: int | torch.SymInt
    made: dict[tuple[fx.Node, str], fx.Node] = field(default_factory=dict)
    _ids: fx.Node | None = None

    def rows(self, emit: Emit) -> fx.Node:
        """How many rows there are, as a node."""
        return emit.call(aten.sym_size.int, self._chosen(), 0)

    def own(self, emit: Emit, node: fx.Node) -> fx.Node:
        """Each row's value of a node."""
        return self._piece(node, "own", (self.batch, *node.meta["val"].shape))

    def matrix(self, emit: Emit, node: fx.Node) -> fx.Node:
        """Each row's value of a weight, turned."""
        rows, columns = node.meta["val"].shape
        return self._piece(node, "matrix", (self.batch, columns, rows))

    def tables(self, emit: Emit, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | int]:
        """The values of all adapters, which of them each row has, and how long the longest is."""
        tables = self._piece(node, "tables", (2, *node.meta["val"].shape))
        return tables, self._chosen(), emit.call(aten.sym_size.int, tables, 1)

    def _piece(self, node: fx.Node, form: str, shape: tuple[Any, ...]) -> fx.Node:
        if (node, form) not in self.made:
            read = self._read(f"p{len(self.made)}", node, shape, node.meta["val"].dtype)
            self.made[node, form] = read
        return self.made[node, form]

    def _chosen(self) -> fx.Node:
        if self._ids is None:
            inputs = self.graph.find_nodes(op="placeholder")
            first = next(each for each in inputs if isinstance(each.meta["val"], torch.Tensor))
            self._ids = self._read(IDS, first, (self.batch,), torch.int64)
        return self._ids

    def _read(self, name: str, near: fx.Node, shape: tuple[Any, ...], dtype: torch.dtype) -> fx.Node:
        at = next(each for each in self.graph.nodes if each.op != "placeholder")
        value = near.meta["val"]
        with value.fake_mode:
            fake = torch.empty(shape, dtype=dtype, device=value.device)
        return Emit(self.graph, at, Origin(RouteRows.name, site_of(near)), like=near).slot(f"{ROUTED}.{name}", fake)


def _batch(graph: fx.Graph) -> int | torch.SymInt:
    """How many rows a call has: the first size of its activations, or else of its tokens."""
    values = [each.meta["val"] for each in graph.find_nodes(op="placeholder")]
    tensors = [each for each in values if isinstance(each, torch.Tensor) and each.dim()]
    first = next((each for each in tensors if each.is_floating_point() and each.dim() > 1), None)
    found: int | torch.SymInt = (tensors[0] if first is None else first).shape[0]
    return found


def _fixed(graph: fx.Graph, constants: Collection[str] = ()) -> dict[fx.Node, None]:
    """The nodes that depend on adapters (in more than `constants`) and on no input, in the graph's order."""
    constant: set[fx.Node] = set()
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            constant.add(node)
            if str(node.target).startswith(SLOTS) and node.target not in constants:
                found[node] = None
        elif _is_computed(node) and all(each in constant for each in node.all_input_nodes):
            constant.add(node)
            if any(each in found for each in node.all_input_nodes):
                found[node] = None
    return found


def _is_computed(node: fx.Node) -> bool:
    """Whether a node is a tensor, or several, that is the same for the same operands; or is drawn for each row."""
    drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _is_drawn(node)
    return node.op == "call_function" and not drawn and isinstance(node.meta["val"], torch.Tensor | tuple | list)


def _is_drawn(node: fx.Node) -> bool:
    """Whether numbers are drawn for a value of an adapter: each row has its own, as it has its own value."""
    return node.target is aten.rand_like.default


def draws_numbers(graph: fx.Graph) -> bool:
    """Whether a graph draws random numbers as it runs; dropout with a probability of zero draws none."""
    return any(
        torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and _p(node) for node in graph.nodes
    )


def _p(node: fx.Node) -> Any:
    """The probability of a dropout, or 1 for what draws in another way."""
    match node.target:
        case aten.dropout.default:
            return node.args[1] if node.args[2] else 0
        case aten.scaled_dot_product_attention.default:
            return node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0)
        case _:
            return 1


def _scale_up(graph: fx.Graph) -> None:
    """linear(s * y, B)  ->  linear(y, s * B), which no activation goes into"""
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        args: tuple[Any, ...] = node.args
        scaled, weight, *bias = args
        if bias or not isinstance(scaled, fx.Node) or scaled.target is not aten.mul.Tensor:
            continue
        operands: tuple[Any, ...] = scaled.args
        y, scale = operands[:2]
        slots = _is_slot(scale) and _is_slot(weight)
        if slots and not scale.meta["val"].dim() and not _is_slot(y):
            emit = Emit(graph, node, node.meta["peftc"], like=node)
            node.args = (y, emit.call(aten.mul.Tensor, weight, scale))


def _is_slot(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and str(node.target).startswith(SLOTS)


def _lanes(graph: fx.Graph, fixed: Mapping[fx.Node, None], values: _Pieces) -> Iterator[LanePieces]:
    """The pieces by the slots they are made of, each with the graph that computes it."""
    found: dict[frozenset[str], list[tuple[fx.Node, str, str]]] = {}
    members: dict[str, list[str]] = {}
    for (node, form), read in values.made.items():
        name = str(read.target).rpartition(".")[2]
        owner, _, leaf = str(node.target).rpartition(".")
        if node.op == "get_attr" and leaf == MEMBER:
            members.setdefault(owner, []).append(name)
        else:
            found.setdefault(frozenset(_owners(node)), []).append((node, form, name))
    for slots, pieces in found.items():
        wanted = list(dict.fromkeys(node for node, _, _ in pieces))
        own = [name for owner in slots for name in members.get(owner, ())]
        made = tuple(Piece(name, wanted.index(node), form, node.meta["val"].dtype) for node, form, name in pieces)
        yield LanePieces(slots, _prologue(graph, wanted), made, tuple(own))


def _owners(node: fx.Node) -> Iterator[str]:
    """The slots that a value depends on."""
    left, seen = [node], {node}
    while left:
        each = left.pop()
        if _is_slot(each):
            yield str(each.target).rpartition(".")[0]
        left += [one for one in each.all_input_nodes if one not in seen]
        seen.update(each.all_input_nodes)


def _prologue(graph: fx.Graph, wanted: list[fx.Node]) -> fx.Graph:
    needed: set[fx.Node] = set()
    left = list(wanted)
    while left:
        node = left.pop()
        if node not in needed:
            needed.add(node)
            left += node.all_input_nodes
    made, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node in needed:
            copied[node] = made.node_copy(node, lambda each: copied[each])
    made.output(tuple(copied[each] for each in wanted))
    return made
