"""Lets attention modules look at learned prompts, beside what they look at."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.foreign.transformers import PACKED, SEPARATE
from peftc.passes.insert.insert_delta import SlotValue, UnfitError
from peftc.passes.ir.bodies import module_path
from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.pass_manager import Change, Miss
from peftc.passes.ir.stages import Stage
from peftc.passes.plan.structure import Structure, VirtualTokens
from peftc.passes.virtual_tokens import widen
from peftc.passes.virtual_tokens.attention import Attention, attentions
from peftc.passes.virtual_tokens.front_value import expanded, front_value

aten = torch.ops.aten

Weights = Mapping[str, fx.Node]


@dataclass(frozen=True)
class InsertAttention:
    """attn(x)  ->  attn(x) + o(gate * attention(q(x), k(P), v(P)))

    q is what the module itself compares with keys, rotated where it rotates; k, v and o are the base's own projections
    with their biases, whatever other adapters do there, and k(P) is not rotated. Every token sees every prompt. Modules
    that project to q, k and v at once have no o here. Scores are divided by the root of a head's size.
    """

    structure: Structure
    slot_value: SlotValue
    name: ClassVar[str] = "insert-attention"
    leaves: ClassVar[Stage] = Stage.ADAPTED

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place. Raises UnfitError where a module's attention is not found."""
        fronts = self.structure.at("attention")
        if not fronts or widen.is_done(graph, self.name):
            return Change()
        weights = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
        looked = attentions(graph)
        made = 0
        for front in fronts:
            module = front.site.module
            if not any(f"{module}.{each}.weight" in weights for each in (PACKED, SEPARATE[1])):
                continue  # a graph of another part of the model
            places = [each for each in looked if module in module_path(each.node)]
            found = [self.check(each, front) for each in places]
            if not found:
                raise UnfitError(front.site, "its attention is not found in the graph")
            for each in found:
                made += self._insert(graph, front, each, weights)
        return Change(made=made)

    def check(self, attention: Attention | Miss, front: VirtualTokens) -> Attention:
        """An attention that is understood. Raises UnfitError."""
        if isinstance(attention, Miss):
            raise UnfitError(front.site, f"its attention is not understood: {attention.reason} (at {attention.node})")
        if attention.query.meta["val"].dim() != 4:
            raise UnfitError(front.site, "its heads are not an axis of their own")
        if front.tasks:
            raise UnfitError(front.site, "its prompt' is by task")
        return attention

    def _insert(self, graph: fx.Graph, front: VirtualTokens, attention: Attention, weights: Weights) -> int:
        result = _result(attention.node, front.site.module)
        if result.meta["val"].dim() != 3 or result.meta["val"].shape[-1] != front.site.out_features:
            raise UnfitError(front.site, f"its output is not hidden states (at {result})")
        emit = Emit(graph, result.next, Origin(self.name, front.site.name), like=attention.node)
        values = front_value(emit, front, self.slot_value, attention.query, None)
        prompt = values.of(front.term.weight)
        gate = None if front.term.bias is None else values.of(front.term.bias)
        seen = self._attend(emit, front, attention, prompt, weights)
        if gate is not None:
            seen = emit.call(aten.mul.Tensor, seen, emit.cast(gate, emit.tensor(seen).dtype))
        rows, length = (emit.call(aten.sym_size.int, attention.query, axis) for axis in (0, 2))
        merged = emit.call(aten.transpose.int, seen, 1, 2)
        merged = emit.call(aten.reshape.default, merged, [rows, length, math.prod(emit.tensor(merged).shape[2:])])
        out = f"{front.site.module}.{SEPARATE[3]}"
        if f"{out}.weight" in weights:
            merged = _linear(emit, merged, out, weights)
        if emit.tensor(merged).shape[-1] != front.site.out_features:
            raise UnfitError(front.site, f"its heads give {emit.tensor(merged).shape[-1]} numbers a token")
        total = emit.call(aten.add.Tensor, result, emit.cast(merged, result.meta["val"].dtype))
        result.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        return len(emit.made)

    def _attend(
        self, emit: Emit, front: VirtualTokens, attention: Attention, prompt: fx.Node, weights: Weights
    ) -> fx.Node:
        """What every query sees of the prompts, `[rows, heads, tokens, size]`."""
        query = attention.query
        heads, size = (int(emit.tensor(query).shape[axis]) for axis in (1, 3))
        projected = _projected(emit, front, prompt, weights)
        rows = widen.rows_of(emit, query)
        parts = []
        for node, each in zip(projected, (size, int(emit.tensor(attention.value).shape[3])), strict=True):
            own, rest = divmod(int(emit.tensor(node).shape[1]), each)
            if rest or heads % max(own, 1):
                raise UnfitError(
                    front.site, f"its keys and values are not whole heads of {each} for {heads} of queries"
                )
            node = emit.call(aten.reshape.default, node, [1, front.length, own, each])
            node = emit.call(aten.transpose.int, node, 1, 2)
            parts.append(expanded(emit, emit.cast(node, emit.tensor(query).dtype), rows))
        grouped = {"enable_gqa": True} if emit.tensor(parts[0]).shape[1] != heads else {}
        return emit.call(aten.scaled_dot_product_attention.default, query, *parts, scale=1 / math.sqrt(size), **grouped)


def _projected(emit: Emit, front: VirtualTokens, prompt: fx.Node, weights: Weights) -> tuple[fx.Node, fx.Node]:
    """The keys and values of the prompts, `[length, heads * size]`."""
    packed = weights.get(f"{front.site.module}.{PACKED}.weight")
    if packed is None:
        key, value = (_linear(emit, prompt, f"{front.site.module}.{each}", weights) for each in SEPARATE[1:3])
        return key, value
    bias = weights.get(f"{front.site.module}.{PACKED}.bias")
    width = int(emit.tensor(packed).shape[1]) // 3
    prompt = emit.cast(prompt, emit.tensor(packed).dtype)
    both = emit.call(aten.matmul.default, prompt, emit.call(aten.slice.Tensor, packed, 1, width, 3 * width))
    if bias is not None:
        both = emit.call(aten.add.Tensor, both, emit.call(aten.slice.Tensor, bias, 0, width, 3 * width))
    key, value = (emit.call(aten.slice.Tensor, both, 1, start, start + width) for start in (0, width))
    return key, value


def _linear(emit: Emit, x: fx.Node, module: str, weights: Weights) -> fx.Node:
    weight, bias = weights[f"{module}.weight"], weights.get(f"{module}.bias")
    x = emit.cast(x, emit.tensor(weight).dtype)
    return emit.call(aten.linear.default, x, weight, *([] if bias is None else [bias]))


def _result(node: fx.Node, module: str) -> fx.Node:
    """What the module makes of what was attended to: the last that depends on it there."""
    reached, last = {node}, node
    while node.next.op != "output":
        node = node.next
        if module in module_path(node) and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            last = node
    return last
