"""What must be true of a graph after every pass."""

from collections.abc import Callable

from torch import fx

from peftc.passes.ir.emit import Origin

Legal = Callable[[fx.Node], bool]


class VerifyError(AssertionError):
    """A pass of ours left a broken graph: a bug in peftc. Names the pass and the node, and carries the graph's text."""

    def __init__(self, after: str, problem: str, graph: fx.Graph):
        self.after, self.problem, self.graph = after, problem, str(graph)
        super().__init__(f"after pass {after!r}: {problem}\n{self.graph}")


def verify(graph: fx.Graph, *, after: str, legal: Legal) -> None:
    """Raise VerifyError unless the graph is well formed, typed, and made of operators legal at this stage.

    Every node but the output has `meta["val"]`; a node with `meta["peftc"]` says which pass made it.
    """
    try:
        graph.lint()
    except RuntimeError as error:
        raise VerifyError(after, str(error), graph) from error
    for node in graph.nodes:
        if node.op == "output":
            continue
        if "val" not in node.meta:
            raise VerifyError(after, f"node {node} has no value", graph)
        origin = node.meta.get("peftc")
        if origin is not None and not (isinstance(origin, Origin) and origin.made_by):
            raise VerifyError(after, f"node {node} does not say who made it", graph)
        if not legal(node):
            raise VerifyError(after, f"node {node} calls {node.target}, which is not legal here", graph)
