"""Takes what depends on weights and parameters alone out of a graph, to be computed once and kept."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.ir.emit import Origin
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.stages import Stage
from peftc.passes.ir.views import is_view
from peftc.passes.quantized.packed_operators import PACKED_LINEAR, UNPACK
from peftc.passes.quantized.schemes.packing import from_text

PIECES = "pieces"
KEPT_SHARE = 8


@dataclass(frozen=True)
class Hoist:
    """f(x, g(W, A))  ->  f(x, piece), piece = g(W, A)

    For adapters that are not trained. At the sites of `transient` a whole weight would be kept for every call to save
    little: there the graph stays as it is. Where the base stores its weight packed, only what is small beside it is
    kept. The graph that computes the pieces, in order, is the change's prologue.
    """

    transient: frozenset[str]
    name: ClassVar[str] = "hoist"
    leaves: ClassVar[Stage] = Stage.FUSED

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        fixed, kept = _fixed(graph, self.transient)
        roots = [each for each in graph.nodes if each in kept and any(user not in kept for user in each.users)]
        prologue, copied = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in graph.nodes:
            if node in fixed:
                copied[node] = prologue.node_copy(node, lambda each: copied[each])
        for index, root in enumerate(roots):
            with graph.inserting_before(root):
                piece = graph.create_node("get_attr", f"{PIECES}.p{index}")
            piece.meta = dict(root.meta)
            root.replace_all_uses_with(piece, delete_user_cb=lambda user: user not in kept)
        prologue.output(tuple(copied[each] for each in roots))
        prologue.eliminate_dead_code()
        removed = len(graph.nodes)
        graph.eliminate_dead_code()
        return Change(len(roots), removed - len(graph.nodes), prologue=prologue if roots else None)


def kept_nodes(graph: fx.Graph, transient: frozenset[str] = frozenset()) -> set[fx.Node]:
    """The adapters' nodes that no activation goes into, without those that are mere views of what is there anyway."""
    return _fixed(graph, transient)[1]


def _fixed(graph: fx.Graph, transient: frozenset[str]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes that no activation goes into, and those of them that are worth keeping."""
    fixed: set[fx.Node] = set()
    worth: set[fx.Node] = set()
    limits = _limits(graph)
    for node in graph.nodes:
        if node.op == "get_attr":
            fixed.add(node)
        elif _is_ours(node, transient) and all(each in fixed for each in node.all_input_nodes):
            fixed.add(node)
            is_small = _size(node) <= limits.get(node.meta["peftc"].site, math.inf)
            if is_small and (not is_view(node) or _any(node.all_input_nodes, worth)):
                worth.add(node)
    return fixed, worth


def _limits(graph: fx.Graph) -> dict[str, int]:
    """How many numbers a piece may hold at the sites whose weights are stored packed: an eighth of the weight's."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.target in (PACKED_LINEAR, UNPACK):
            packing = from_text(node.args[3] if node.target is PACKED_LINEAR else node.args[1])
            found[node.meta["peftc"].site] = packing.out_features * packing.in_features // KEPT_SHARE
    return found


def _size(node: fx.Node) -> int:
    """How many numbers a node gives, all its results together."""
    value = node.meta["val"]
    return sum(each.numel() for each in (value if isinstance(value, tuple | list) else (value,)))


def _is_ours(node: fx.Node, transient: frozenset[str]) -> bool:
    origin = node.meta.get("peftc")
    drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())  # anew in every call
    return node.op == "call_function" and isinstance(origin, Origin) and origin.site not in transient and not drawn


def _any(nodes: Iterable[fx.Node], among: set[fx.Node]) -> bool:
    return any(each in among for each in nodes)
