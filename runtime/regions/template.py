"""A graph as Python code that modules alike share, and the code bound to one of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from peftc.passes.optimize.hoist import PIECES
from peftc.passes.plan.structure import TASK
from peftc.passes.route.route_rows import ROUTED, LanePieces
from peftc.runtime.adapters.slots import Kept
from peftc.runtime.execution.program import Alias, Held, HoistedConstants, Lowered, constant_name, namespace_of
from peftc.runtime.execution.segments import Namespace, python_function, writes_outside
from peftc.runtime.mixed_batch.batch import Chosen, MixedBatch
from peftc.runtime.mixed_batch.row_pieces import Compute, Draw, Lane, RowPieces

OWN = ("slots.", "copies.r")  # of adapters, and of nothing that the base has
OURS = (PIECES, ROUTED)  # what is computed beforehand, and not read from modules

Constants = Mapping[str, torch.Tensor | nn.Module]


@dataclass(eq=False)
class Template:
    """A lowered graph, compiled once. `bind` gives a function of the graph's inputs that reads from live modules."""

    lowered: Lowered
    constants: Constants
    writes: bool = field(init=False)  # to what it does not make
    _main: "_Reader" = field(init=False)
    _prologue: "_Reader | None" = field(init=False)
    _lanes: "list[_Reader]" = field(init=False)

    def __post_init__(self) -> None:
        prologue = self.lowered.prologue
        self.writes = writes_outside(self.lowered.plain)
        self._main = _Reader(self.lowered.plain, self.constants)
        self._prologue = None if prologue is None else _Reader(prologue, {})
        self._lanes = [_Reader(each.prologue, {}) for each in self.lowered.lanes]

    def bind(self, held: Held, rows: "Rows | None" = None) -> "Code":
        """The function over live modules; `rows` say what every row has of adapters, where each has its own."""
        if rows is not None:
            own = _row_pieces(self.lowered.lanes, self._lanes, rows, self.lowered.grouped)
            return Code(self._main.code, self._main.root(held, own.values), own, self.writes)
        pieces = None
        if self._prologue is not None:
            root = self._prologue.root(held, {})
            pieces = HoistedConstants(self._prologue.sources(held), partial(self._prologue.code, root))
        root = self._main.root(held, {} if pieces is None else pieces.values)
        return Code(self._main.code, root, pieces, self.writes)


class Rows(Protocol):
    """What the rows of a call have inside of one module."""

    @property
    def batch(self) -> MixedBatch:
        """Which adapters the rows have."""
        ...

    @property
    def module(self) -> nn.Module:
        """The module."""
        ...

    def slots(self, own: frozenset[str]) -> frozenset[str]:
        """The slots of the model that these of the module are."""
        ...

    def everyone(self, own: frozenset[str]) -> bool:
        """Whether there is a value of these slots for whatever a row has: the base's, if nothing else."""
        ...

    def held(self, chosen: Chosen | None) -> Held:
        """Where graphs find what they read of one choice."""
        ...


def row_pieces(lowered: Lowered, rows: Rows) -> RowPieces:
    """What a lowered graph reads of the rows of a call. Takes the graphs that compute it over."""
    return _row_pieces(lowered.lanes, [_Reader(each.prologue, {}) for each in lowered.lanes], rows)


def _row_pieces(
    lanes: Sequence[LanePieces], readers: "Sequence[_Reader]", rows: Rows, grouped: frozenset[str] = frozenset()
) -> RowPieces:
    base = rows.held(None)
    made = [
        Lane(
            lane,
            rows.slots(lane.slots),
            _computing(reader, rows),
            rows.everyone(lane.slots),
            reader.base(base),
            drawing=_drawing(reader, rows) if lane.draws else None,
        )
        for lane, reader in zip(lanes, readers, strict=True)
    ]
    return RowPieces(rows.batch, made, rows.module, grouped)


def _computing(reader: "_Reader", rows: Rows) -> Compute:
    """What gives the values of a lane for a choice; where it reads is found once for each."""
    roots: WeakKeyDictionary[Chosen, Namespace] = WeakKeyDictionary()

    def compute(chosen: Chosen | None) -> tuple[torch.Tensor, ...]:
        root = None if chosen is None else roots.get(chosen)
        if root is None:
            root = reader.root(rows.held(chosen), {})
            if chosen is not None:
                roots[chosen] = root
        made: tuple[torch.Tensor, ...] = reader.code(root)
        return made

    return compute


def _drawing(reader: "_Reader", rows: Rows) -> Draw:
    """What gives the values of a lane for tasks of one adapter, a row each: all that is drawn for them at once."""

    def draw(chosen: Chosen, tasks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kept, held, asked = (
            rows.held(chosen),
            dict[str, torch.Tensor](),
            tasks.to(next(rows.module.parameters()).device),
        )
        root = reader.root(lambda owner, leaf: (held, leaf) if leaf == TASK else kept(owner, leaf), {})

        def one(task: torch.Tensor) -> tuple[torch.Tensor, ...]:
            held[TASK] = task
            made: tuple[torch.Tensor, ...] = reader.code(root)
            return made

        found: tuple[torch.Tensor, ...] = torch.vmap(one, randomness="different")(asked)
        return found

    return draw


class _Reader:
    """A graph's code, and where it reads: from the attributes of its first argument. Takes the graph over."""

    def __init__(self, graph: fx.Graph, constants: Constants):
        self._constants = {constant_name(target): value for target, value in constants.items()}
        self._names: dict[str, tuple[str, str]] = {}  # of a namespace: owner, one leaf read of it
        self._targets: list[tuple[str, str]] = []
        short: dict[tuple[str, str], str] = {}
        for node in graph.find_nodes(op="get_attr"):
            target = str(node.target)
            if target in constants:
                node.target = constant_name(target)
                continue
            owner, _, leaf = target.rpartition(".")
            self._targets.append((owner, leaf))
            name = short.setdefault((owner, "" if owner in OURS else leaf), f"n{len(short)}")
            self._names[name] = (owner, leaf)
            node.target = f"{name}.{leaf}"
        self.code: Callable[..., Any] = python_function(graph)

    def root(self, held: Held, pieces: dict[str, Any]) -> Namespace:
        """What the code reads from, where modules, adapters and pieces are."""
        root = Namespace()
        for name, (owner, leaf) in self._names.items():
            where, kept = (pieces, leaf) if owner in OURS else held(owner, leaf)
            setattr(root, name, namespace_of(where, leaf, kept))
        for name, value in self._constants.items():
            setattr(root, name, value)
        return root

    def base(self, held: Held) -> list[Kept]:
        """Where the base's tensors are kept that it reads, or that stand for copies of such."""
        return [held(owner, leaf) for owner, leaf in self._targets if not owner.startswith(OWN)]

    def sources(self, held: Held) -> list[Kept]:
        """Where everything is kept that it reads."""
        return [held(owner, leaf) for owner, leaf in self._targets]


@dataclass(frozen=True, eq=False)
class Code:
    """A function of a graph's inputs, what it reads, and what of that is refreshed before it is called."""

    function: Callable[..., tuple[Any, ...]]
    root: Namespace
    pieces: HoistedConstants | RowPieces | None
    writes: bool = False

    def frozen(self) -> Callable[..., tuple[Any, ...]]:
        """The function over the very tensors that there are now, whatever is replaced later."""
        root = Namespace()
        for name, value in vars(self.root).items():
            if isinstance(value, Alias):
                setattr(root, name, Alias(dict(value._held), value._name))
            elif isinstance(value, Namespace):
                copied = Namespace()
                copied.__dict__ = dict(value.__dict__)
                setattr(root, name, copied)
            else:
                setattr(root, name, value)
        return partial(self.function, root)
