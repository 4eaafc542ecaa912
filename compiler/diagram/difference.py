"""What a rewrite did to a graph, in one picture."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import fx

from peftc.compiler.diagram.build import draw, finish
from peftc.compiler.diagram.model import Edge, Node, Picture


def diff(
    before: fx.Graph,
    after: fx.Graph,
    *,
    unfold: bool = False,
    focus: Callable[[str], bool] | None = None,
    names: Sequence[str] = (),
) -> Picture:
    """The picture of `after` with what it adds to `before` marked, and what it removes struck.

    Both graphs come from one trace, so that a node that stayed has its name in both.
    """
    old, new = draw(before, names), draw(after, names)
    targets = {node.name: node.target for node in before.nodes}
    # A group stays if the operator it is called after does, whatever plumbing it absorbed.
    stayed = {node.name for node in after.nodes if node.name in targets and targets[node.name] == node.target}
    owner = {name: node.id for node in new.nodes for name in node.members}
    home = {each.id: owner[each.id] if each.id in stayed else None for each in old.nodes}
    nodes = {node.id: _marked(node, stayed) for node in new.nodes}
    read = {weight.name for node in new.nodes for weight in node.weights}
    removed = []
    for node in old.nodes:
        target = home[node.id]
        if target is None:
            struck = replace(node, id=f"{node.id} (removed)", status="removed")
            removed.append(struck)
            home[node.id] = struck.id
            continue
        nodes[target] = _with_lost_weights(nodes[target], node, read)
    present = {(edge.source, edge.target) for edge in new.edges}
    lost = []
    for edge in old.edges:
        moved = (home[edge.source] or "", home[edge.target] or "")
        if edge.kind != "returned" and moved not in present and moved[0] != moved[1]:
            present.add(moved)
            lost.append(Edge(*moved, "removed", edge.shape))
    clusters = {each.path: each for each in (*new.clusters, *old.clusters)}
    picture = replace(
        new,
        clusters=tuple(clusters.values()),
        nodes=(*nodes.values(), *removed),
        edges=(*new.edges, *lost),
    )
    return finish(picture, unfold=unfold, focus=focus)


def _marked(node: Node, stayed: set[str]) -> Node:
    return node if node.id in stayed else replace(node, status="added")


def _with_lost_weights(node: Node, old: Node, read: set[str]) -> Node:
    """A base tensor that nothing reads any more is struck where it was read."""
    gone = [replace(weight, status="removed") for weight in old.weights if weight.name not in read]
    return replace(node, weights=(*node.weights, *gone))
