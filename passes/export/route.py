"""Lets every row of a call choose its adapter from a bank.

What depends on adapters alone is computed for each of them, once and for all, and stacked. Where it meets what depends
on the call, the operator is given each row's own: see `peftc.passes.route.laws`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.export.fold import Values, computed, drop_unused, fixed_nodes, frontier
from peftc.passes.export.lift import Lifted, check_unbound, propagate
from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.inputs import BATCH, InputSpec
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.roles import Role
from peftc.passes.ir.stages import Stage
from peftc.passes.route.laws import Router, UnroutedError, site_of

aten = torch.ops.aten


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
    rows = _Bank(lifted, chosen)
    for node in wanted:
        values = [each[node] for each in found]
        if any(each.shape != values[0].shape or each.dtype != values[0].dtype for each in values):
            raise UnroutedError(node, "the adapters' tensors are of different sizes")
        if all(torch.equal(each, values[0]) for each in values):
            kept = lifted.add_tensor(f"folded.{node.name}", values[0].contiguous().clone())
            node.replace_all_uses_with(kept, delete_user_cb=lambda user: user not in fixed)
        else:
            if _is_tall(node, [each for each in node.users if each not in fixed]):
                rows.turned.add(node)
                values = [each.transpose(0, 1) for each in values]
            rows.banks[node] = lifted.add_tensor(f"bank.{node.name}", torch.stack(values))
    router = Router(lifted.graph, rows, rows.banks)
    users = {user: None for node in rows.banks for user in node.users if user not in fixed}
    # What was one for all rows may now be each row's own, and whatever reads it too.
    as_before = [router.rewrite(node) for node in [each for each in lifted.graph.nodes if each in users]]
    drop_unused(lifted)
    if all(as_before):
        check_unbound(lifted)
    else:
        propagate(lifted)


@dataclass
class _Bank:
    """What a bank holds of every adapter, and which of them each row has: an input."""

    lifted: Lifted
    ids: fx.Node
    banks: dict[fx.Node, fx.Node] = field(default_factory=dict)
    turned: set[fx.Node] = field(default_factory=set)  # of which the bank has rows for columns
    _own: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @property
    def batch(self) -> int | torch.SymInt:
        """How many rows there are."""
        return self.lifted.symbols[BATCH]

    def rows(self, emit: Emit) -> fx.Node:
        """How many rows there are, as a node."""
        return emit.call(aten.sym_size.int, self.ids, 0)

    def own(self, emit: Emit, node: fx.Node) -> fx.Node:
        """Each row's value of a node; chosen once."""
        if node not in self._own:
            before = next(each for each in self.lifted.graph.nodes if each.op != "placeholder")
            first = Emit(self.lifted.graph, before, Origin(Route.name, site_of(before)), like=before)
            own = first.call(aten.index_select.default, self.banks[node], 0, self.ids)
            self._own[node] = first.call(aten.transpose.int, own, 1, 2) if node in self.turned else own
        return self._own[node]

    def matrix(self, emit: Emit, node: fx.Node) -> fx.Node:
        """Each row's value of a weight, turned."""
        return emit.call(aten.transpose.int, self.own(emit, node), -1, -2)

    def tables(self, emit: Emit, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | int]:
        """The values of all adapters, which of them each row has, and how long each is."""
        return self.banks[node], self.ids, int(node.meta["val"].shape[0])


def _is_tall(weight: fx.Node, users: Sequence[fx.Node]) -> bool:
    """Whether it is the weight of linears and has more rows than columns: products of batches are slow over few."""
    shape = weight.meta["val"].shape
    is_weight = all(each.target is aten.linear.default and each.args[1] is weight for each in users)
    return is_weight and len(shape) == 2 and shape[0] > shape[1]
