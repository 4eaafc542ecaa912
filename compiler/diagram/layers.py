"""Layers: the clusters of modules that are elements of a list."""

import re
from collections import Counter
from dataclasses import replace

from peftc.compiler.diagram.model import ROOT, Picture

INDEX = re.compile(r"(.*?)\.?(\d+)(@\d+)?")
"""The label of a layer: its list, its number, and which call of it."""

NUMBER = re.compile(r"\d+")


def settled(picture: Picture) -> Picture:
    """Numbered inputs that one layer alone reads, such as its part of a cache, stand in that layer.

    An input of its own name, such as what the first layer starts from, stays outside.
    """
    clusters = {each.path: each for each in picture.clusters}
    homes = {node.id: node.cluster for node in picture.nodes}

    def layer(path: str) -> str:
        found = ROOT
        while path != ROOT:
            if INDEX.fullmatch(clusters[path].label):
                found = path
            path = clusters[path].parent
        return found

    readers: dict[str, set[str]] = {}
    for edge in picture.edges:
        readers.setdefault(edge.source, set()).add(layer(homes[edge.target]))
    names = Counter(unnumbered(node.title) for node in picture.nodes if node.kind == "input")
    nodes = tuple(
        replace(node, cluster=next(iter(readers[node.id])))
        if node.kind == "input" and names[unnumbered(node.title)] > 1 and len(readers.get(node.id, ())) == 1
        else node
        for node in picture.nodes
    )
    return replace(picture, nodes=nodes)


def unnumbered(title: str) -> str:
    """What the same input of every layer is called."""
    return NUMBER.sub("*", title)
