"""Takes what depends on weights and parameters alone out of a graph, to be computed once and kept."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from peftc.passes.driver import Change
from peftc.passes.emit import Origin
from peftc.passes.work import is_view

PIECES = "pieces"


@dataclass(frozen=True)
class Hoist:
    """f(x, g(W, A))  ->  f(x, piece), piece = g(W, A)

    For adapters that are not trained. At the sites of `transient` a whole weight would be kept for every call to save
    little: there the graph stays as it is. `prologue` receives the graph that computes the pieces, in order.
    """

    transient: frozenset[str]
    prologue: fx.Graph = field(hash=False, compare=False)
    name: ClassVar[str] = "hoist"

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        fixed, kept = _fixed(graph, self.transient)
        roots = [each for each in graph.nodes if each in kept and any(user not in kept for user in each.users)]
        copied: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if node in fixed:
                copied[node] = self.prologue.node_copy(node, lambda each: copied[each])
        for index, root in enumerate(roots):
            with graph.inserting_before(root):
                piece = graph.create_node("get_attr", f"{PIECES}.p{index}")
            piece.meta = dict(root.meta)
            root.replace_all_uses_with(piece, delete_user_cb=lambda user: user not in kept)
        self.prologue.output(tuple(copied[each] for each in roots))
        self.prologue.eliminate_dead_code()
        removed = len(graph.nodes)
        graph.eliminate_dead_code()
        return Change(made=len(roots), removed=removed - len(graph.nodes))

    def legal(self, node: fx.Node) -> bool:
        """Anything that was legal before."""
        return True


def kept_nodes(graph: fx.Graph, transient: frozenset[str] = frozenset()) -> set[fx.Node]:
    """The adapters' nodes that no activation goes into, without those that are mere views of what is there anyway."""
    return _fixed(graph, transient)[1]


def _fixed(graph: fx.Graph, transient: frozenset[str]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes that no activation goes into, and those of them that are worth keeping."""
    fixed: set[fx.Node] = set()
    worth: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            fixed.add(node)
        elif _is_ours(node, transient) and all(each in fixed for each in node.all_input_nodes):
            fixed.add(node)
            if not is_view(node) or _any(node.all_input_nodes, worth):
                worth.add(node)
    return fixed, worth


def _is_ours(node: fx.Node, transient: frozenset[str]) -> bool:
    origin = node.meta.get("peftc")
    return node.op == "call_function" and isinstance(origin, Origin) and origin.site not in transient


def _any(nodes: Iterable[fx.Node], among: set[fx.Node]) -> bool:
    return any(each in among for each in nodes)
