"""Lets trained rows take the place of a weight's own, without another weight of its size."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.insert.insert_delta import SlotValue
from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.pass_manager import Change, Miss
from peftc.passes.ir.stages import Stage
from peftc.passes.plan.plan import IDS, ORDER, ROWS
from peftc.passes.plan.structure import ReplacedRows, Structure, rows_slot, slot_role

aten = torch.ops.aten


@dataclass(frozen=True)
class Lookup:
    """`embedding(W, ids)`. What is found for `padding` sends no gradient back."""

    node: fx.Node
    ids: fx.Node
    padding: int | None


@dataclass(frozen=True)
class Head:
    """`linear(h, W, b)`."""

    node: fx.Node
    h: fx.Node


@dataclass(frozen=True)
class InsertTokens:
    """embedding(W, i) -> embedding(W[rows], i);  linear(h, W) -> linear(h, W[rows]);  W[rows] = W, with rows replaced

    An embedding is looked up as it is, and where one of the tokens was, its row is put. To the logits of a head the
    difference of the rows is added, for the tokens alone. Only where a weight is used in another way (by an adapter
    that computes with the whole of it) is W[rows] computed. Under `autocast` a tensor's type is not the one that it
    was traced with.
    """

    structure: Structure
    slot_value: SlotValue
    autocast: bool = False
    name: ClassVar[str] = "insert-tokens"
    leaves: ClassVar[Stage] = Stage.ADAPTED

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        found: dict[str, list[ReplacedRows]] = {}
        for each in self.structure.rows:
            found.setdefault(each.target, []).append(each)
        made, misses = 0, list[Miss]()
        for weight in graph.find_nodes(op="get_attr"):
            if str(weight.target) in found:
                made += self._replace(graph, weight, found[str(weight.target)], misses)
        return Change(made=made, misses=tuple(misses))

    def check(self, use: fx.Node, weight: fx.Node) -> Lookup | Head | Miss:
        """How a node uses the weight."""
        match use.target:
            case aten.embedding.default if use.args[0] is weight:
                padding = use.args[2] if len(use.args) > 2 else -1
                return Lookup(use, _node(use.args[1]), padding if isinstance(padding, int) and padding >= 0 else None)
            case aten.linear.default if use.args[1] is weight and use.args[0] is not weight:
                return Head(use, _node(use.args[0]))
            case _:
                return Miss(f"the weight is used by {use.target}", use)

    def _replace(self, graph: fx.Graph, weight: fx.Node, rows: Sequence[ReplacedRows], misses: list[Miss]) -> int:
        made = 0
        whole: fx.Node | None = None
        for use in [each for each in weight.users if not self._is_ours(each)]:
            found = self.check(use, weight)
            if isinstance(found, Miss):
                misses.append(replace(found, site=rows[0].module))
                if whole is None:
                    whole, count = self._whole(graph, weight, rows)
                    made += count
                use.replace_input_with(weight, whole)
            elif not any(self._is_ours(user) for user in use.users):
                made += self._put(graph, found, weight, rows)
        return made

    def _is_ours(self, node: fx.Node) -> bool:
        origin = node.meta.get("peftc")
        return isinstance(origin, Origin) and origin.made_by == self.name

    def _put(self, graph: fx.Graph, found: Lookup | Head, weight: fx.Node, rows: Sequence[ReplacedRows]) -> int:
        emit = Emit(graph, found.node.next, Origin(self.name, rows[0].module), like=found.node)
        total = found.node
        for each in rows:
            if isinstance(found, Lookup):
                total = self._looked_up(emit, total, found, weight, each)
            else:
                total = self._added(emit, total, found, weight, each)
        found.node.replace_all_uses_with(total, delete_user_cb=lambda user: user not in emit.made)
        return len(emit.made)

    def _looked_up(self, emit: Emit, total: fx.Node, found: Lookup, weight: fx.Node, rows: ReplacedRows) -> fx.Node:
        values, ids = self._slots(emit, weight, rows)
        if found.padding is not None:
            is_padding = emit.call(aten.unsqueeze.default, emit.call(aten.eq.Scalar, ids, found.padding), -1)
            values = emit.call(aten.where.self, is_padding, emit.call(aten.detach.default, values), values)
        tokens = emit.cast(found.ids, torch.int64)
        # The last of the ids that is not above the token, or the first: no id has to be counted for that.
        above = emit.call(aten.searchsorted.Tensor, ids, tokens, right=True)
        place = emit.call(aten.clamp.default, emit.call(aten.sub.Tensor, above, 1), 0)
        is_one = emit.call(aten.eq.Tensor, emit.call(aten.index.Tensor, ids, [place]), tokens)
        row = emit.call(aten.embedding.default, values, place)
        return emit.call(aten.where.self, emit.call(aten.unsqueeze.default, is_one, -1), row, total)

    def _added(self, emit: Emit, total: fx.Node, found: Head, weight: fx.Node, rows: ReplacedRows) -> fx.Node:
        values, ids = self._slots(emit, weight, rows)
        before = emit.call(aten.index_select.default, weight, 0, ids)
        kind = weight.meta["val"].dtype
        exact = torch.float32 if kind.itemsize < 4 else kind  # a difference of numbers that are nearly the same
        change = emit.call(aten.sub.Tensor, emit.cast(values, exact), emit.cast(before, exact))
        added = emit.call(aten.linear.default, emit.cast(found.h, exact), change)
        if self.autocast:
            added = emit.call(aten.type_as.default, added, total)
        return emit.call(aten.index_add.default, total, -1, ids, emit.cast(added, total.meta["val"].dtype))

    def _whole(self, graph: fx.Graph, weight: fx.Node, rows: Sequence[ReplacedRows]) -> tuple[fx.Node, int]:
        emit = Emit(graph, weight.next, Origin(self.name, rows[0].module), like=next(iter(weight.users)))
        whole = weight
        for each in rows:
            values, ids = self._slots(emit, weight, each)
            whole = emit.call(aten.index_copy.default, whole, 0, ids, values)
        return whole, len(emit.made)

    def _slots(self, emit: Emit, weight: fx.Node, rows: ReplacedRows) -> tuple[fx.Node, fx.Node]:
        """The rows by ascending id, in the weight's type, and the ids."""
        slot = rows_slot(rows.position, rows.source)

        def read(role: str) -> fx.Node:
            value = self.slot_value(rows.position, rows.source, role, weight)
            return emit.slot(f"{slot}.{slot_role(role)}", value, rows.position, slot_role(role))

        values, order, ids = read(ROWS), read(ORDER), read(IDS)
        ordered = emit.call(aten.embedding.default, values, order)
        return emit.cast(ordered, weight.meta["val"].dtype), ids


def _node(argument: object) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument
