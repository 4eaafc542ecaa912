"""Lets every row of a call choose its adapter from a bank, which is given with the call.

What depends on adapters alone is computed for each of them, once and for all, and stacked: see `bank_pieces`. Where it
meets what depends on the call, the operator is given each row's own: see `peftc.passes.route.laws`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.export.bank_pieces import pieces_of
from peftc.passes.export.fold import computed, drop_unused, fixed_nodes
from peftc.passes.export.lift import Dimension, Lifted, check_unbound, propagate
from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.inputs import BATCH, InputSpec
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.roles import Role
from peftc.passes.ir.stages import Stage
from peftc.passes.route.laws import Router, site_of

aten = torch.ops.aten

BANK = "bank"
"""The input of a program that is a dictionary of the tensors of all adapters."""

NOBODY = -1
"""The number of a row that has none of the adapters, where the bank's first is the base's."""

ADAPTERS = "adapters"
"""The dimension that counts what is in the bank."""

Sizes = Mapping[str, Sequence[int]]
"""How large a piece of one adapter is, by its name."""


@dataclass(frozen=True)
class Route:
    """f(x, g(A))  ->  f(x, bank[ids]), bank = stack(g(A_1), g(A_2), ...)

    `slots` are the names of adapters' tensors in the lifted graph, and what pieces call them; of these `constants` have
    the values that they have, for every row. `sizes` are those of the pieces; those that are `turned` have the two axes
    of a matrix in the other order. The bank's parts become inputs `bank.NAME`, `[adapters, ..]`, and which of them a
    row has is the input `ids`, `[batch]` int64: with `base`, -1 is the bank's first, which has nothing of any adapter,
    else 0 is.
    """

    slots: Mapping[str, str] = field(compare=False)
    constants: frozenset[str]
    ids: str
    sizes: Sizes = field(compare=False)
    turned: frozenset[str] = frozenset()
    base: bool = False
    name: ClassVar[str] = "route"
    leaves: ClassVar[Stage] = Stage.CLOSED

    def run(self, lifted: Lifted) -> Change:
        """Rewrite in place. Raises UnroutedError, and BoundError as `check_unbound`."""
        before = set(lifted.graph.nodes)
        _route(lifted, self)
        after = set(lifted.graph.nodes)
        return Change(len(after - before), len(before - after))


def _route(lifted: Lifted, law: Route) -> None:
    slots = lifted.tensors_named(frozenset(law.slots))
    pieces, fixed = pieces_of(lifted, law.slots), fixed_nodes(lifted, slots)
    own = {piece.node: piece for piece in pieces if not piece.reads <= law.constants}
    _keep(lifted, [piece.node for piece in pieces if piece.node not in own and piece.node not in slots], fixed)
    device = next(iter(lifted.inputs.values())).meta["val"].device
    chosen = lifted.add_input(InputSpec(law.ids, Role.ADAPTERS, axes=((BATCH,),)), torch.int64, device)
    lifted.add_dimension(Dimension(ADAPTERS, max(each.sample for each in lifted.dimensions) + 1))
    rows = _Bank(lifted, chosen, law.base)
    for node, piece in own.items():
        name, sizes = f"{BANK}.{piece.name}", [*law.sizes[piece.name]]
        if piece.name in law.turned:
            rows.turned.add(node)
            sizes.reverse()
        # What is computed twice, where a module is called twice, has one name and one input.
        known = lifted.inputs.get(name)
        spec = InputSpec(name, axes=((ADAPTERS,), *sizes))
        rows.banks[node] = known or lifted.add_input(spec, node.meta["val"].dtype, device)
    router = Router(lifted.graph, rows, rows.banks)
    users = {user: None for node in rows.banks for user in node.users if user not in fixed}
    # What was one for all rows may now be each row's own, and whatever reads it too.
    as_before = [router.rewrite(node) for node in [each for each in lifted.graph.nodes if each in users]]
    drop_unused(lifted)
    if all(as_before):
        check_unbound(lifted)
    else:
        propagate(lifted)


def _keep(lifted: Lifted, nodes: Sequence[fx.Node], fixed: Collection[fx.Node]) -> None:
    """Compute what every row has alike, once and for all."""
    (found,) = computed(lifted, [lifted.tensors], dict.fromkeys(nodes))
    for node, value in found.items():
        kept = lifted.add_tensor(f"folded.{node.name}", value.contiguous().clone())
        node.replace_all_uses_with(kept, delete_user_cb=lambda user: user not in fixed)


def is_tall(node: fx.Node, sizes: Sequence[int], fixed: Collection[fx.Node]) -> bool:
    """Whether a piece of this size is the weight of linears and has more rows than columns: then it is kept turned,
    since products of batches are slow over few.
    """
    outside = [each for each in node.users if each not in fixed]
    is_weight = all(each.target is aten.linear.default and each.args[1] is node for each in outside)
    return is_weight and len(sizes) == 2 and sizes[0] > sizes[1]


@dataclass
class _Bank:
    """What a bank holds of every adapter, and which of them each row has: inputs."""

    lifted: Lifted
    given: fx.Node
    base: bool
    banks: dict[fx.Node, fx.Node] = field(default_factory=dict)
    turned: set[fx.Node] = field(default_factory=set)  # of which the bank has rows for columns
    _own: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _ids: fx.Node | None = None

    @property
    def batch(self) -> int | torch.SymInt:
        """How many rows there are."""
        return self.lifted.symbols[BATCH]

    def rows(self, emit: Emit) -> fx.Node:
        """How many rows there are, as a node."""
        return emit.call(aten.sym_size.int, self.given, 0)

    def own(self, emit: Emit, node: fx.Node) -> fx.Node:
        """Each row's value of a node; chosen once."""
        if node not in self._own:
            first = self._first(self.ids)
            own = first.call(aten.index_select.default, self.banks[node], 0, self.ids)
            self._own[node] = first.call(aten.transpose.int, own, 1, 2) if node in self.turned else own
        return self._own[node]

    def matrix(self, emit: Emit, node: fx.Node) -> fx.Node:
        """Each row's value of a weight, turned."""
        return emit.call(aten.transpose.int, self.own(emit, node), -1, -2)

    def tables(self, emit: Emit, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | int]:
        """The values of all adapters, which of them each row has, and how long each is."""
        bank = self.banks[node]
        return bank, self.ids, int(bank.meta["val"].shape[1])

    @property
    def ids(self) -> fx.Node:
        """Which row of the bank each row of the call has."""
        if self._ids is None:
            self._ids = self._first().call(aten.add.Tensor, self.given, -NOBODY) if self.base else self.given
        return self._ids

    def _first(self, after: fx.Node | None = None) -> Emit:
        """Where nodes can be read by all others; behind a node that is there already."""
        first = next(each for each in self.lifted.graph.nodes if each.op != "placeholder")
        at = after.next if after is not None and after.op != "placeholder" else first
        return Emit(self.lifted.graph, at, Origin(Route.name, site_of(at)), like=first)
