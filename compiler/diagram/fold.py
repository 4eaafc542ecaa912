"""Runs of identical layers are drawn once."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import networkx as nx

from peftc.compiler.diagram.layers import INDEX, unnumbered
from peftc.compiler.diagram.model import Cluster, Edge, Fold, Node, Picture
from peftc.compiler.diagram.operators import TIMES
from peftc.compiler.diagram.scope import relative


@dataclass(frozen=True)
class _Layer:
    """A cluster of an indexed module, everything in it, and its place."""

    cluster: Cluster
    stem: str
    index: int
    ids: frozenset[str]


def fold(picture: Picture) -> Picture:
    """Fold every run, the outermost first; layers differ where anything but their names and numbers does."""
    done: set[str] = set()
    while True:
        run = next((run for run in _runs(picture) if run[0][0].cluster.path not in done), None)
        if run is None:
            return picture
        layers, images = run
        done.add(layers[0].cluster.path)
        if len(layers) > 1:
            picture = _folded(picture, layers, images)


_Line = tuple[str, str, str]
"""A node of a layer, as it is called in the first one; the node it is connected to; the kind of edge."""

_Images = dict[str, tuple[str, ...]]
"""A node of the first layer -> the nodes that correspond to it in the others."""


def _runs(picture: Picture) -> Iterator[tuple[list[_Layer], _Images]]:
    shapes = _shape_of(picture)
    for siblings in _siblings(picture):
        start = 0
        while start < len(siblings):
            run = [siblings[start]]
            images: _Images = dict.fromkeys(run[0].ids, ())
            while (end := start + len(run)) < len(siblings):
                candidate = siblings[end]
                mapping = _isomorphism(shapes, run[0], candidate)
                if candidate.index != run[-1].index + 1 or mapping is None:
                    break
                extended = {each: (*images[each], mapping[each]) for each in images}
                if not _same_surroundings(picture, [*run, candidate], extended):
                    break
                run.append(candidate)
                images = extended
            yield run, images
            start += len(run)


def _siblings(picture: Picture) -> list[list[_Layer]]:
    """The clusters that are elements of one list, in order; the outer lists first."""
    inside = _contents(picture)
    found: dict[tuple[str, str], list[_Layer]] = {}
    for cluster in picture.clusters:
        match = INDEX.fullmatch(cluster.label)
        if match and inside[cluster.path]:
            key = (cluster.parent, match[1])
            found.setdefault(key, []).append(_Layer(cluster, match[1], int(match[2]), frozenset(inside[cluster.path])))
    return [sorted(each, key=lambda layer: layer.index) for each in found.values()]


def _contents(picture: Picture) -> dict[str, list[str]]:
    parents = {each.path: each.parent for each in picture.clusters}
    inside: dict[str, list[str]] = {each: [] for each in parents}
    for node in picture.nodes:
        path = node.cluster
        while path:
            inside[path].append(node.id)
            path = parents[path]
    return inside


def _shape_of(picture: Picture) -> "nx.DiGraph[str]":
    drawn: nx.DiGraph[str] = nx.DiGraph()
    for node in picture.nodes:
        drawn.add_node(node.id, node=node)
    for edge in picture.edges:
        drawn.add_edge(edge.source, edge.target, kind=edge.kind)
    return drawn


def _isomorphism(drawn: "nx.DiGraph[str]", first: _Layer, second: _Layer) -> dict[str, str] | None:
    if len(first.ids) != len(second.ids):
        return None
    parts = []
    for layer in (first, second):
        part = drawn.subgraph(layer.ids).copy()
        for each in part.nodes:
            part.nodes[each]["face"] = _face(drawn.nodes[each]["node"], layer.cluster.module)
        parts.append(part)
    matcher = nx.isomorphism.DiGraphMatcher(
        *parts,
        node_match=lambda one, other: one["face"] == other["face"],
        edge_match=lambda one, other: one["kind"] == other["kind"],
    )
    return dict(matcher.mapping) if matcher.is_isomorphic() else None


def _face(node: Node, module: str) -> tuple[object, ...]:
    """All that must agree for two nodes to be drawn as one."""
    weights = tuple((relative(each.name, module), each.shape, len(each.tied), each.status) for each in node.weights)
    local = (relative(node.module, module), relative(node.site, module))
    title = unnumbered(node.title) if node.kind == "input" else node.title
    return node.kind, title, node.lines, local, node.position, weights, node.operators, node.status


def _same_surroundings(picture: Picture, run: list[_Layer], images: _Images) -> bool:
    """Whether the last layer of a run takes and gives what the one before it takes and gives.

    What passes from layer to layer, the first takes from anywhere and the last gives to anything.
    """
    place = {local: (0, local) for local in images}
    place |= {each: (index, local) for local, others in images.items() for index, each in enumerate(others, start=1)}
    taken: list[set[_Line]] = [set() for _ in run]
    given: list[set[_Line]] = [set() for _ in run]
    entries: list[set[str]] = [set() for _ in run]
    seen: list[set[str]] = [set() for _ in run]  # entries that a focus does not hide
    exits: list[set[str]] = [set() for _ in run]
    for edge in picture.edges:
        source, source_local = place.get(edge.source, (-1, edge.source))
        target, target_local = place.get(edge.target, (-1, edge.target))
        if source == target:
            continue
        if source >= 0 and target == source + 1:
            taken[target].add((target_local, source_local, edge.kind))
            entries[target].add(target_local)
            seen[target] |= {target_local} if edge.kind != "through" else set()
            exits[source].add(source_local)
            continue
        if target >= 0:
            taken[target].add((target_local, edge.source, edge.kind))
        if source >= 0:
            given[source].add((source_local, edge.target, edge.kind))
    last = len(run) - 1
    passed = entries[last]
    gives = given[last - 1] <= given[last] and all(each[0] in exits[last - 1] for each in given[last] - given[last - 1])
    if last > 1:
        return gives and taken[last] == taken[last - 1] and exits[last - 1] == exits[last - 2]
    served = {each[0] for each in taken[0]}
    aside = [{each for each in lines if each[0] not in passed} for lines in taken[:2]]
    return gives and seen[last] <= served and aside[0] == aside[1]


def _folded(picture: Picture, layers: list[_Layer], images: _Images) -> Picture:
    stands_for = {each: local for local, others in images.items() for each in others}
    by_id = {node.id: node for node in picture.nodes}
    nodes = []
    for node in picture.nodes:
        if node.id in stands_for:
            continue
        others = [by_id[each] for each in images.get(node.id, ())]
        if others:
            hidden = tuple(name for each in others for name in (*each.members, *each.folded))
            title = node.title if all(each.title == node.title for each in others) else unnumbered(node.title)
            node = replace(node, title=title, folded=(*node.folded, *hidden))
        nodes.append(node)
    gone = {each.cluster.path for each in layers[1:]}
    parents = {each.path: each.parent for each in picture.clusters}
    kept = [each for each in picture.clusters if not _within(each.path, gone, parents)]
    first = layers[0].cluster
    run = Fold(tuple(each.cluster.module for each in layers))
    name = f"{layers[0].stem} {layers[0].index}-{layers[-1].index}, {TIMES}{run.count}".strip()
    clusters = tuple(replace(each, label=name, fold=run) if each.path == first.path else each for each in kept)
    return replace(picture, clusters=clusters, nodes=tuple(nodes), edges=_redirected(picture, layers, stands_for))


def _redirected(picture: Picture, layers: list[_Layer], stands_for: dict[str, str]) -> tuple[Edge, ...]:
    inside = [each.ids for each in layers]
    found: dict[tuple[str, str], Edge] = {}
    for edge in picture.edges:
        source_layer = next((i for i, ids in enumerate(inside) if edge.source in ids), None)
        target_layer = next((i for i, ids in enumerate(inside) if edge.target in ids), None)
        if source_layer is not None and target_layer is not None and source_layer != target_layer:
            continue  # from one layer of the run to the next
        moved = replace(
            edge,
            source=stands_for.get(edge.source, edge.source),
            target=stands_for.get(edge.target, edge.target),
        )
        found.setdefault((moved.source, moved.target), moved)
    return tuple(found.values())


def _within(path: str, gone: set[str], parents: dict[str, str]) -> bool:
    while path:
        if path in gone:
            return True
        path = parents[path]
    return False
