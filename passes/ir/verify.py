"""What must be true of a graph after every pass."""

from torch import fx

from peftc.passes.ir.emit import Origin
from peftc.passes.ir.stages import Stage, is_legal
from peftc.passes.ir.values import wrong_value


class VerifyError(AssertionError):
    """A pass of ours left a broken graph: a bug in peftc. Names the pass and the node, and carries the graph's text."""

    def __init__(self, after: str, problem: str, graph: fx.Graph):
        self.after, self.problem, self.graph = after, problem, str(graph)
        super().__init__(f"after pass {after!r}: {problem}\n{self.graph}")


def verify(graph: fx.Graph, *, after: str, stage: Stage, full: bool = False) -> None:
    """Raise VerifyError unless the graph is well formed, holds what it says, and is made of operators legal there.

    Every node but the output has `meta["val"]`, and it is what its operator gives for its operands' values: see
    `infer.why_not` for what cannot be asked. A node with `meta["peftc"]` says which pass made it. With `full` what was
    found right before is looked at again.
    """
    try:
        graph.lint()
    except RuntimeError as error:
        raise VerifyError(after, str(error), graph) from error
    right: set[object] = set()
    for node in graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            raise VerifyError(after, f"node {node} has no value", graph)
        origin = node.meta.get("peftc")
        if origin is not None and not (isinstance(origin, Origin) and origin.made_by):
            raise VerifyError(after, f"node {node} does not say who made it", graph)
        if not is_legal(node, stage):
            where = f"which is not legal in a graph that is {stage.name.lower()}"
            raise VerifyError(after, f"node {node} calls {node.target}, {where}", graph)
        wrong = wrong_value(node, full=full, right=right)
        if wrong is not None:
            raise VerifyError(after, wrong, graph)
