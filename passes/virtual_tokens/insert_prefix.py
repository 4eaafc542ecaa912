"""Puts keys and values in front of those a cache holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.insert.insert_delta import SlotValue, UnfitError
from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.inputs import BATCH, InputSpec, describe, own_cache, spec_of, with_role
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.roles import Role, Stack
from peftc.passes.ir.stages import Stage
from peftc.passes.ir.values import refresh
from peftc.passes.plan.site import Site
from peftc.passes.plan.structure import Structure
from peftc.passes.virtual_tokens import widen
from peftc.passes.virtual_tokens.attention_bias import Weighing, cached_attentions, weighted
from peftc.passes.virtual_tokens.front_value import by_slot, expanded, length_of, prompts

aten = torch.ops.aten
CACHING = (Stack.ONLY, Stack.DECODER)  # whose keys and values a cache holds
CARRIED = "carried_"  # in front of the names of inputs that hold keys and values of virtual tokens

Pair = tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class InsertPrefix:
    """graph(mask, cache)  ->  graph(1 ⊕ mask, prefix ⊕ cache)

    The caller's cache never holds the prefix: it is put in front on the way in and cut off on the way out. Real tokens
    take the positions after it. `cached` is how many of the outputs, the last ones, are the cache's. Attention to a
    prefix with a weight is multiplied by it: see `weigh`.
    """

    structure: Structure
    slot_value: SlotValue
    cached: int
    encoder_decoder: bool = False
    name: ClassVar[str] = "insert-prefix"
    leaves: ClassVar[Stage] = Stage.WIDENED

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place. Raises UnfitError where the cache is another than the config says."""
        fronts = self.structure.at("cache")
        own = own_cache(graph)
        if not fronts or widen.is_done(graph, self.name):
            return Change()
        site, length = fronts[0].site, length_of(fronts)
        check(own, site)
        emit = Emit(graph, widen.first_node(graph), Origin(self.name, site.name), like=own[0])
        value = emit.tensor(own[0])
        prefix = by_slot(emit, prompts(emit, fronts, self.slot_value, own[0], dtype=value.dtype), site, length)
        leads = []
        for layer in range(len(own) // 2):
            # PEFT reads every layer of a decoder beside an encoder from these places, and files are made for them.
            slot = (4 * layer) % (2 * site.layers) if self.encoder_decoder else 2 * layer
            leads.append(tuple(emit.call(aten.slice.Tensor, prefix, 0, slot + i, slot + i + 1) for i in (0, 1)))
        attending = cached_attentions(graph, own, fronts[0]) if weighted(fronts) else []
        lead_cache(graph, emit, own, leads, length, self.cached)
        Weighing(emit, fronts, self.slot_value, own[0]).all(attending)
        return Change(made=len(emit.made))


@dataclass(frozen=True)
class CarryPrompt:
    """graph(mask, cache)  ->  graph(1 ⊕ mask, carried ⊕ cache)

    What virtual tokens left in the cache when a text began is an input of every later call: `carried_0_key`, ... of one
    row, or of as many as the call has.
    """

    structure: Structure
    cached: int
    name: ClassVar[str] = "carry-prompt"
    leaves: ClassVar[Stage] = Stage.WIDENED

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        fronts = self.structure.at("prompt")
        own = own_cache(graph)
        if not fronts or not own or any(with_role(graph, Role.CARRIED)):
            return Change()
        length, per_row = length_of(fronts), any(each.tasks for each in fronts)
        emit = Emit(graph, widen.first_node(graph), Origin(self.name, fronts[0].site.name), like=own[0])
        nodes = []
        for each in own:
            value = emit.tensor(each)
            rows = value.shape[0] if per_row else 1
            slot = spec_of(each).slot
            with graph.inserting_before(emit.before):
                node = graph.placeholder(f"{CARRIED}{slot}")
            with value.fake_mode:  # type: ignore[attr-defined]
                shape = (rows, value.shape[1], length, value.shape[3])
                node.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
            node.meta["peftc"] = emit.origin
            axes = ((BATCH,) if per_row else 1, int(shape[1]), length, int(shape[3]))
            describe(node, InputSpec(str(node.target), Role.CARRIED, axes=axes, slot=slot))
            nodes.append(node)
        lead_cache(graph, emit, own, list(widen.pairs(nodes)), length, self.cached)
        return Change(made=len(emit.made) + len(nodes))


def check(own: Sequence[fx.Node], site: Site) -> None:
    """Raise UnfitError where a cache's inputs are not the keys and values that the prefix is made for."""
    if not own:
        raise UnfitError(site, "the call has no cache of keys and values")
    if len(own) > 2 * site.layers:
        raise UnfitError(site, f"its config says {site.layers} layers, and the cache has {len(own) // 2}")
    wanted = (site.heads, site.in_features // site.heads)
    for node in own:
        _, heads, _, size = node.meta["val"].shape
        if any(isinstance(each, int) and each != said for each, said in zip((heads, size), wanted, strict=True)):
            says = f"{wanted[0]} heads of {wanted[1]} numbers"
            raise UnfitError(site, f"its config says {says}, and {node.target} has {heads} of {size}")


def lead_cache(
    graph: fx.Graph,
    emit: Emit,
    own: Sequence[fx.Node],
    leads: Sequence[tuple[fx.Node, ...]],
    length: int,
    cached: int,
) -> None:
    """Put keys and values in front of the cache's inputs, cut them off its outputs, and widen masks and positions."""
    rows = widen.rows_of(emit, own[0])
    wider: list[tuple[fx.Node, fx.Node]] = []
    for past, lead in zip(own, (each for pair in leads for each in pair), strict=True):
        wider.append((past, emit.call(aten.cat.default, [expanded(emit, lead, rows), past], 2)))
    for mask in with_role(graph, Role.MASK, *CACHING):
        wider.append((mask, widen.wider_mask(emit, mask, length, queries=False)))
    for positions in with_role(graph, Role.POSITIONS, *CACHING):
        wider.append((positions, emit.call(aten.add.Tensor, positions, length)))
    for node, wide in wider:
        widen.put_for(node, wide, emit)
    refresh(graph)
    cut_cache(graph, emit, len(own), length, cached)


def cut_cache(graph: fx.Graph, emit: Emit, own: int, length: int, cached: int) -> list[fx.Node]:
    """Cut the virtual tokens off the cache's own outputs. Returns what these outputs were."""
    values = widen.outputs(graph)
    if not cached:
        return []
    start = len(values) - cached
    (output,) = graph.find_nodes(op="output")
    after = Emit(graph, output, emit.origin, like=emit.like)
    whole: list[fx.Node] = values[start : start + own]
    kept = [after.call(aten.slice.Tensor, each, 2, length, 2**63 - 1) for each in whole]
    emit.made.extend(after.made)
    widen.set_outputs(graph, [*values[:start], *kept, *values[start + own :]])
    return whole
