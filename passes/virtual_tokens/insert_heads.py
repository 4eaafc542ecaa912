"""Puts keys and values in front of those that attention reads, where a model keeps no cache of them."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from peftc.passes.insert.insert_delta import SlotValue, UnfitError
from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.infer import is_same_size
from peftc.passes.ir.inputs import with_role
from peftc.passes.ir.pass_manager import Change, Miss
from peftc.passes.ir.roles import Role
from peftc.passes.ir.stages import Stage
from peftc.passes.ir.values import refresh
from peftc.passes.optimize.group_heads import repeated
from peftc.passes.plan.site import Site
from peftc.passes.plan.structure import Structure
from peftc.passes.virtual_tokens import widen
from peftc.passes.virtual_tokens.attention import Attention, attentions
from peftc.passes.virtual_tokens.attention_bias import Weighing, weighted
from peftc.passes.virtual_tokens.front_value import by_slot, expanded, length_of, prompts

aten = torch.ops.aten

POSITIONS = "position_embeddings.weight"  # how the names of learned embeddings of positions end


@dataclass(frozen=True)
class InsertHeads:
    """attention(q, k, v, mask)  ->  attention(q, prefix_k ⊕ k, prefix_v ⊕ v, 1 ⊕ mask)

    The i-th attention of the graph is that of the i-th layer, with its keys at 2i of the prefix and its values at
    2i + 1. Where positions are learned, tokens of a text take those after the prefix, as they do behind a cache.
    """

    structure: Structure
    slot_value: SlotValue
    name: ClassVar[str] = "insert-heads"
    leaves: ClassVar[Stage] = Stage.WIDENED

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place. Raises UnfitError where the attention of the layers is not found."""
        fronts = self.structure.at("cache")
        if not fronts or widen.is_done(graph, self.name):
            return Change()
        site, length = fronts[0].site, length_of(fronts)
        found = check(graph, site)
        near = found[0].key
        emit = Emit(graph, widen.first_node(graph), Origin(self.name, site.name), like=near)
        prefix = prompts(emit, fronts, self.slot_value, near, dtype=emit.tensor(near).dtype)
        prefix = by_slot(emit, prefix, site, length)
        putting = _Putting(emit, length)
        for layer, each in enumerate(found):
            putting.at(each, prefix, 2 * layer)
        refresh(graph)
        if weighted(fronts):
            Weighing(emit, fronts, self.slot_value, near).all(found)
        if any(with_role(graph, Role.TOKENS)) or any(with_role(graph, Role.EMBEDDINGS)):
            _shift_positions(graph, emit, site, length)
            refresh(graph)
        return Change(made=len(emit.made))


def check(graph: fx.Graph, site: Site) -> list[Attention]:
    """The attention of every layer. Raises UnfitError."""
    looked = attentions(graph)
    found = [each for each in looked if isinstance(each, Attention)]
    if len(found) != site.layers:
        misses = [each for each in looked if isinstance(each, Miss)]
        reason = f"the model has {site.layers} layers, and its graph attends {len(found)} times"
        raise UnfitError(site, f"{reason}; {misses[0].reason} (at {misses[0].node})" if misses else reason)
    size = site.in_features // site.heads
    for each in found:
        if each.is_causal:
            raise UnfitError(site, f"{each.module} hides what comes later without a mask")
        for node in (each.key, each.value):
            shape = _plain(node).meta["val"].shape
            if shape[-1] != size or (len(shape) == 4 and shape[1] != site.heads):
                heads = f"{shape[1]} heads" if len(shape) == 4 else "heads"
                wanted = f"{site.heads} of {size} as the config says"
                raise UnfitError(site, f"{each.module} has {heads} of {shape[-1]} numbers, not {wanted}")
    return found


@dataclass
class _Putting:
    emit: Emit
    length: int
    wider: dict[fx.Node, fx.Node] = field(default_factory=dict)  # masks that layers share are widened once

    def at(self, attention: Attention, prefix: fx.Node, slot: int) -> None:
        """Let one attention read the prefix's keys at `slot`, and its values at the next."""
        self._lead(attention.key, attention.key_user, prefix, slot)
        self._lead(attention.value, attention.value_user, prefix, slot + 1)
        for mask in attention.masks:
            axis = mask.node.meta["val"].dim() - 1
            if axis < 0 or is_same_size(mask.node.meta["val"].shape[axis], 1):
                continue  # it says the same of every key
            if mask.node not in self.wider:
                emit = self._before(mask.user)
                self.wider[mask.node] = widen.led_by(emit, mask.node, self.length, mask.seen, axis)
                self.emit.made += emit.made
            mask.user.replace_input_with(mask.node, self.wider[mask.node])
        for view in attention.views:
            *sizes, last = _sizes(view)
            if last != -1:
                emit = self._before(view)
                view.args = (view.args[0], [*sizes, emit.call(operator.add, last, self.length)])
                self.emit.made += emit.made

    def _lead(self, node: fx.Node, user: fx.Node, prefix: fx.Node, slot: int) -> None:
        emit, plain = self._before(user), _plain(node)
        lead = emit.call(aten.slice.Tensor, prefix, 0, slot, slot + 1)
        rows = widen.rows_of(emit, plain)
        if emit.tensor(plain).dim() == 4:
            wide = emit.call(aten.cat.default, [expanded(emit, lead, rows), plain], 2)
        else:
            lead = emit.call(aten.squeeze.dim, lead, 0)
            rows = emit.call(operator.floordiv, rows, emit.tensor(lead).shape[0])
            wide = emit.call(aten.cat.default, [emit.call(aten.repeat.default, lead, [rows, 1, 1]), plain], 1)
        if plain is not node:
            wide = _repeat(emit, wide, int(node.meta["val"].shape[1]), rows)
        user.replace_input_with(node, wide)
        self.emit.made += emit.made

    def _before(self, node: fx.Node) -> Emit:
        return Emit(self.emit.graph, node, self.emit.origin, like=node)


def _plain(node: fx.Node) -> fx.Node:
    """Keys or values before grouped heads are repeated."""
    found = repeated(node)
    return node if found is None else found


def _repeat(emit: Emit, node: fx.Node, heads: int, rows: fx.Node) -> fx.Node:
    """Grouped heads again as many times as queries have them."""
    own, size = (int(emit.tensor(node).shape[axis]) for axis in (1, 3))
    node = emit.call(aten.unsqueeze.default, node, 2)
    node = emit.call(aten.expand.default, node, [-1, -1, heads // own, -1, -1])
    return emit.call(aten.reshape.default, node, [rows, heads, -1, size])


def _sizes(view: fx.Node) -> Sequence[Any]:
    sizes = view.args[1]
    assert isinstance(sizes, Sequence)
    return sizes


def _shift_positions(graph: fx.Graph, emit: Emit, site: Site, length: int) -> None:
    """Look positions up `length` further on; padding keeps the row that is its own."""
    for node in graph.find_nodes(op="call_function", target=aten.embedding.default):
        table, places = node.args[:2]
        if not str(table.target).endswith(POSITIONS):
            continue
        rows = table.meta["val"].shape[0]
        if length >= rows:
            raise UnfitError(site, f"the model has {rows} positions, and the prefix takes {length} of them")
        own = Emit(graph, node, emit.origin, like=node)
        shifted = own.call(aten.add.Tensor, places, length)
        padding = node.args[2] if len(node.args) > 2 else -1
        if padding >= 0:
            is_padding = own.call(aten.eq.Scalar, places, padding)
            shifted = own.call(aten.where.self, is_padding, places, shifted)
        node.replace_input_with(places, shifted)
        emit.made += own.made
