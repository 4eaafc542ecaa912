"""Puts virtual tokens in front of the embedded ones."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from peftc.passes.foreign.peft import TASK_IDS
from peftc.passes.foreign.transformers import name_of
from peftc.passes.insert.insert_delta import SlotValue, UnfitError
from peftc.passes.ir.bodies import module_path
from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.infer import is_same_size
from peftc.passes.ir.inputs import BATCH, InputSpec, describe, inputs_of, with_role
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.roles import Role, Stack
from peftc.passes.ir.stages import Stage
from peftc.passes.ir.values import refresh
from peftc.passes.plan.structure import Structure, VirtualTokens
from peftc.passes.virtual_tokens import widen
from peftc.passes.virtual_tokens.front_value import expanded, front_value, length_of, prompts
from peftc.passes.virtual_tokens.insert_prefix import cut_cache

aten = torch.ops.aten
IGNORED = -100  # the label that losses leave out
READING = (Stack.ONLY, Stack.ENCODER)  # whose tokens prompts stand in front of


@dataclass(frozen=True)
class InsertPrompt:
    """graph(E(ids), mask, labels)  ->  graph(prompt ⊕ E(ids), 1 ⊕ mask, labels' ⊕ labels)

    The ids get placeholders in front too, so that everything that depends on their number follows. What comes out for
    the virtual tokens is cut off again, unless PEFT's lengths are asked for; what they leave in the cache is returned
    after the other outputs. Of a model with an encoder, the encoder's tokens are meant.
    """

    structure: Structure
    slot_value: SlotValue
    cached: int
    encoder_decoder: bool = False
    filler: int = 0  # an id that is not the padding's
    name: ClassVar[str] = "insert-prompt"
    leaves: ClassVar[Stage] = Stage.WIDENED

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place. Raises UnfitError where the graph embeds no tokens."""
        fronts = self.structure.at("prompt")
        if not fronts or widen.is_done(graph, self.name):
            return Change()
        length, site = length_of(fronts), fronts[0].site
        ids = next(with_role(graph, Role.TOKENS, *READING), None)
        tokens = ids or next(with_role(graph, Role.EMBEDDINGS, *READING), None)
        if tokens is None and self.encoder_decoder:
            return self._only_mask(graph, length, fronts)
        if tokens is None:
            raise UnfitError(site, f"the call gives neither {name_of(Role.TOKENS)} nor {name_of(Role.EMBEDDINGS)}")
        emit = Emit(graph, widen.first_node(graph), Origin(self.name, site.name), like=tokens)
        size = length + emit.tensor(tokens).shape[1]
        tasks = self._tasks(graph, emit, tokens) if any(each.tasks for each in fronts) else None
        order = self._order(emit, _mask(graph), length, fronts)
        wider = dict(self._wider(graph, emit, length, fronts, order))
        embedded = [tokens]
        if tokens is ids:
            wide = widen.led_by(emit, tokens, length, self.filler)
            widen.put_for(tokens, wide, emit)
            embedded = list(_embeddings(graph, wide, {site.weight, *site.tied}))
            if not embedded:
                raise UnfitError(site, "its output is not found in the graph")
        for node, wide in wider.items():
            widen.put_for(node, wide, emit)
        if tokens not in embedded:
            refresh(graph)  # what is embedded is longer now
        for node in embedded:
            self._lead(graph, emit, node, fronts, tasks, order, length if node is not tokens else 0)
        refresh(graph)
        if not self.encoder_decoder:
            self._outputs(graph, emit, fronts, length, size)
        return Change(made=len(emit.made))

    def _only_mask(self, graph: fx.Graph, length: int, fronts: tuple[VirtualTokens, ...]) -> Change:
        """A decoder that reads what an encoder with virtual tokens made, which is longer than the encoder's mask."""
        mask = _mask(graph)
        widen.lengthen_encoded(graph, length)
        if mask is None:
            refresh(graph)
            return Change()
        emit = Emit(graph, widen.first_node(graph), Origin(self.name, fronts[0].site.name), like=mask)
        order = self._order(emit, mask, length, fronts)
        wide = widen.wider_mask(emit, mask, length, queries=False)
        widen.put_for(mask, wide if order is None else widen.in_order(emit, wide, order), emit)
        refresh(graph)
        return Change(made=len(emit.made))

    def _order(
        self, emit: Emit, mask: fx.Node | None, length: int, fronts: tuple[VirtualTokens, ...]
    ) -> fx.Node | None:
        """Where virtual tokens stand in the encoder of a model that knows a token's place by its distance to others."""
        if not self.encoder_decoder or mask is None or emit.tensor(mask).dim() != 2:
            return None
        return None if any(each.compatible for each in fronts) else widen.behind_padding(emit, mask, length)

    def _tasks(self, graph: fx.Graph, emit: Emit, tokens: fx.Node) -> fx.Node:
        like = emit.tensor(tokens)
        with graph.inserting_before(emit.before):
            node = graph.placeholder(TASK_IDS)
        with like.fake_mode:  # type: ignore[attr-defined]
            node.meta["val"] = torch.empty((like.shape[0],), dtype=torch.int64, device=like.device)
        node.meta["peftc"] = emit.origin
        describe(node, InputSpec(TASK_IDS, Role.TASKS, axes=((BATCH,),)))
        return node

    def _wider(
        self,
        graph: fx.Graph,
        emit: Emit,
        length: int,
        fronts: tuple[VirtualTokens, ...],
        order: fx.Node | None,
    ) -> Iterator[tuple[fx.Node, fx.Node]]:
        for node, spec in inputs_of(graph).items():
            value = emit.tensor(node)
            match spec.role:
                case _ if spec.stack not in READING:
                    continue
                case Role.MASK:
                    wide = widen.wider_mask(emit, node, length, queries=True)
                    yield node, wide if order is None else widen.in_order(emit, wide, order)
                case Role.TYPES:
                    yield node, widen.led_by(emit, node, length, 0)
                case Role.POSITIONS if value.dim() == 2:
                    yield node, self._positions(emit, node, length)
                case _ if self.encoder_decoder:
                    continue
                case Role.LABELS if value.dim() == 2 and not value.is_floating_point():
                    yield node, self._labels(emit, node, fronts)
                case Role.BOUNDS:
                    yield node, emit.call(aten.add.Tensor, node, length)

    def _labels(self, emit: Emit, node: fx.Node, fronts: tuple[VirtualTokens, ...]) -> fx.Node:
        """The labels, after those of the virtual tokens: the ones a method says, or ones that losses leave out."""
        kind, leads = emit.tensor(node).dtype, []
        for front in fronts:
            if front.labels is None:
                leads.append(emit.call(aten.new_full.default, node, [front.length], IGNORED))
            else:
                own = front_value(emit, front, self.slot_value, node, None).of(front.labels)
                leads.append(emit.call(aten.to.dtype, own, kind))
        lead = emit.call(aten.unsqueeze.default, emit.call(aten.cat.default, leads), 0)
        return emit.call(aten.cat.default, [expanded(emit, lead, widen.rows_of(emit, node)), node], 1)

    def _positions(self, emit: Emit, node: fx.Node, length: int) -> fx.Node:
        """0, 1, ... for the virtual tokens, and the given ones after them."""
        value = emit.tensor(node)
        lead = emit.call(aten.arange.default, length, dtype=value.dtype, device=value.device)
        lead = emit.call(aten.unsqueeze.default, lead, 0)
        lead = expanded(emit, lead, widen.rows_of(emit, node))
        return emit.call(aten.cat.default, [lead, emit.call(aten.add.Tensor, node, length)], 1)

    def _lead(
        self,
        graph: fx.Graph,
        emit: Emit,
        node: fx.Node,
        fronts: tuple[VirtualTokens, ...],
        tasks: fx.Node | None,
        order: fx.Node | None,
        skip: int,
    ) -> None:
        """Put the prompts in front of the embedded tokens `node`, in place of its first `skip` rows."""
        place = emit.before if node.op == "placeholder" else node.next
        own = Emit(graph, place, emit.origin, like=node)
        weight = next((each for each in node.all_input_nodes if each.op == "get_attr"), None)
        prompt = prompts(own, fronts, self.slot_value, node, dtype=own.tensor(node).dtype, weight=weight, tasks=tasks)
        prompt = expanded(own, prompt, widen.rows_of(own, node))
        rest = own.call(aten.slice.Tensor, node, 1, skip, 2**63 - 1) if skip else node
        whole = own.call(aten.cat.default, [prompt, rest], 1)
        widen.put_for(node, whole if order is None else widen.in_order(own, whole, order), own)
        emit.made.extend(own.made)

    def _outputs(self, graph: fx.Graph, emit: Emit, fronts: tuple[VirtualTokens, ...], length: int, size: Any) -> None:
        (output,) = graph.find_nodes(op="output")
        values = widen.outputs(graph)
        after = Emit(graph, output, emit.origin, like=emit.like)
        own = values[: len(values) - self.cached]
        if not any(each.compatible for each in fronts):
            own = [self._cut(after, each, length, size) for each in own]
        widen.set_outputs(graph, [*own, *values[len(own) :]])
        whole = cut_cache(graph, emit, self.cached, length, self.cached)
        last = Emit(graph, output, emit.origin, like=emit.like)
        carried = [last.call(aten.slice.Tensor, each, 2, 0, length) for each in whole]
        if not any(each.tasks for each in fronts):
            carried = [last.call(aten.slice.Tensor, each, 0, 0, 1) for each in carried]
        widen.set_outputs(graph, [*widen.outputs(graph), *carried])
        emit.made.extend([*after.made, *last.made])

    def _cut(self, emit: Emit, value: Any, length: int, size: Any) -> Any:
        """An output without what it says of the virtual tokens: its second axis counts tokens, `size` with these."""
        if not isinstance(value, fx.Node) or not isinstance(tensor := value.meta["val"], torch.Tensor):
            return value
        if tensor.dim() < 2 or not is_same_size(tensor.shape[1], size):
            return value
        return emit.call(aten.slice.Tensor, value, 1, length, 2**63 - 1)


def _mask(graph: fx.Graph) -> fx.Node | None:
    return next(with_role(graph, Role.MASK, *READING), None)


def _embeddings(graph: fx.Graph, ids: fx.Node, weights: Collection[str]) -> Iterator[fx.Node]:
    """What the embedding module makes of the ids: the last node traced in it, wherever it is called."""
    reached = {ids}
    found: dict[tuple[str, ...], fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or reached.isdisjoint(node.all_input_nodes):
            continue
        path = module_path(node)
        if node.target is aten.embedding.default and node.args[1] in reached and str(node.args[0].target) in weights:
            found[path] = node
        elif found and path not in found:
            continue
        elif found:
            found[path] = node
        reached.add(node)  # before the look-up, a reshape of the ids
    yield from found.values()
