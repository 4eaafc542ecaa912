"""Groups never close a cycle."""

from operator import add, mul

import torch
from torch import fx

from peftc.compiler.diagram.partition import Partition


def diamond() -> tuple[fx.Graph, list[fx.Node]]:
    """x -> a -> b -> c and a -> c."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(add, (x, x))
    b = graph.call_function(mul, (a, a))
    c = graph.call_function(add, (a, b))
    graph.output(c)
    for node in graph.nodes:
        node.meta["val"] = torch.empty(2)
    return graph, [a, b, c]


def test_neighbours_merge() -> None:
    graph, (a, b, _) = diamond()
    partition = Partition(graph.nodes)
    assert partition.merge(a, b)
    assert partition.members(b) == [a, b]


def test_a_detour_forbids_merging() -> None:
    graph, (a, b, c) = diamond()
    partition = Partition(graph.nodes)
    assert not partition.merge(a, c)
    assert partition.of(a) is not partition.of(c)
    assert partition.merge(a, b)
    assert partition.merge(a, c)  # the detour is inside now


def test_groups_hold_every_node_in_order() -> None:
    graph, (a, b, _) = diamond()
    partition = Partition(graph.nodes)
    partition.merge(b, a)
    found = [[node.name for node in members] for members in partition.groups()]
    assert found == [["x"], [a.name, b.name], ["add_1"], ["output"]]
