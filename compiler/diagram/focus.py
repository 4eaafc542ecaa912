"""A part of the picture and what it is connected to."""

from collections.abc import Callable
from dataclasses import replace

import networkx as nx

from peftc.compiler.diagram.model import Edge, Node, Picture


def narrow(picture: Picture, focus: Callable[[str], bool]) -> Picture:
    """Keep the nodes whose module, or a module around it, is in focus, and their direct neighbours as context.

    Where kept nodes are connected only through nodes that are not shown, an edge says so.
    """
    shown = {node.id for node in picture.nodes if _in_focus(node, focus)}
    flow: nx.DiGraph[str] = nx.DiGraph()
    flow.add_nodes_from(node.id for node in picture.nodes)
    flow.add_edges_from((edge.source, edge.target) for edge in picture.edges if edge.kind != "returned")
    context = {other for each in shown for other in (*flow.predecessors(each), *flow.successors(each))} - shown
    kept = shown | context
    nodes = tuple(
        replace(node, status="context") if node.id in context and node.status == "kept" else node
        for node in picture.nodes
        if node.id in kept
    )
    direct = tuple(e for e in picture.edges if {e.source, e.target} <= kept and {e.source, e.target} & shown)
    return replace(picture, nodes=nodes, edges=direct + _through(flow, nodes, kept, direct))


def _in_focus(node: Node, focus: Callable[[str], bool]) -> bool:
    parts = node.module.split(".") if node.module else []
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(focus(path) for path in [*around, *([node.site] if node.site else [])])


def _through(
    flow: "nx.DiGraph[str]", nodes: tuple[Node, ...], kept: set[str], direct: tuple[Edge, ...]
) -> tuple[Edge, ...]:
    """For each kept node the kept ones reached through hidden ones only, unless other edges say so already."""
    hidden = flow.subgraph(set(flow.nodes) - kept)
    drawn: nx.DiGraph[str] = nx.DiGraph((edge.source, edge.target) for edge in direct)
    found = []
    for node in nodes:
        reached: set[str] = set()
        for first in set(flow.successors(node.id)) - kept:
            for each in (first, *nx.descendants(hidden, first)):
                reached.update(target for target in flow.successors(each) if target in kept)
        found += [(node.id, other.id) for other in nodes if other.id in reached and other.id != node.id]
    drawn.add_edges_from(found)
    needed = nx.transitive_reduction(drawn) if nx.is_directed_acyclic_graph(drawn) else drawn
    known = {(edge.source, edge.target) for edge in direct}
    return tuple(Edge(*each, "through") for each in found if each not in known and needed.has_edge(*each))
