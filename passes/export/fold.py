"""Computes what depends on adapters and weights alone, for one adapter or for several."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from peftc.passes.export.lift import Lifted
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.stages import Stage

Values = Mapping[fx.Node, torch.Tensor]
"""The tensors of one adapter, by their placeholders."""


def frontier(lifted: Lifted, slots: frozenset[fx.Node]) -> dict[fx.Node, None]:
    """What depends on an adapter but on no input, and meets what depends on inputs; in the graph's order."""
    fixed = fixed_nodes(lifted, slots)
    return {node: None for node in fixed if any(user not in fixed for user in node.users)}


def fixed_nodes(lifted: Lifted, slots: frozenset[fx.Node]) -> dict[fx.Node, None]:
    """The nodes that depend on an adapter and on no input, the slots among them, in the graph's order."""
    depends: dict[fx.Node, None] = {}
    for node in _constant(lifted):
        if node in slots or any(each in depends for each in node.all_input_nodes):
            depends[node] = None
    return depends


@torch.no_grad()
def computed(
    lifted: Lifted, adapters: Sequence[Values], wanted: Mapping[fx.Node, None]
) -> Iterator[dict[fx.Node, torch.Tensor]]:
    """For each adapter in turn, the values of these nodes, which depend on no input."""
    constant, needed = _constant(lifted), dict(wanted)
    for node in reversed(constant):
        if node in needed:
            needed |= dict.fromkeys(node.all_input_nodes)
    for values in adapters:
        known: dict[fx.Node, Any] = {**lifted.tensors, **values}
        for node in constant:
            if node in needed and node not in known:
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        yield {node: known[node] for node in wanted}


@dataclass(frozen=True)
class Fold:
    """f(x, g(A))  ->  f(x, c), c = g(A), with the values that the lifted graph has for its tensors `slots`"""

    slots: frozenset[str]
    name: ClassVar[str] = "fold"
    leaves: ClassVar[Stage] = Stage.CLOSED

    def run(self, lifted: Lifted) -> Change:
        """Rewrite in place."""
        before, held = len(lifted.graph.nodes), set(lifted.names.values())
        slots = lifted.tensors_named(self.slots)
        fold(lifted, slots, {node: lifted.tensors[node] for node in slots})
        return Change(len(set(lifted.names.values()) - held), max(before - len(lifted.graph.nodes), 0))


def fold(lifted: Lifted, slots: frozenset[fx.Node], values: Values) -> None:
    """f(x, g(A))  ->  f(x, c), c = g(A)"""
    wanted = frontier(lifted, slots)
    (found,) = computed(lifted, [values], wanted)
    for node, value in found.items():
        if node not in slots:
            node.replace_all_uses_with(lifted.add_tensor(f"folded.{node.name}", value.contiguous().clone()))
    drop_unused(lifted)


def drop_unused(lifted: Lifted) -> None:
    """Remove what nothing reads: nodes, and placeholders of tensors."""
    lifted.graph.eliminate_dead_code()
    for node in [each for each in lifted.tensors if not each.users]:
        lifted.graph.erase_node(node)
        del lifted.tensors[node], lifted.names[node]


def _constant(lifted: Lifted) -> dict[fx.Node, None]:
    """The nodes that depend on no input, in the graph's order."""
    found: dict[fx.Node, None] = {}
    for node in lifted.graph.nodes:
        if node in lifted.tensors or (
            node.op == "call_function"
            and all(each in found for each in node.all_input_nodes)
            and all(isinstance(each, torch.Tensor) for each in pytree.tree_leaves(node.meta["val"]))
        ):
            found[node] = None
    return found
