import torch
from torch.testing import assert_close

from peftc.passes.export.fold import drop_unused, fold, frontier
from tests.passes.export.lifted import X, lifted, operators, run

aten = torch.ops.aten
TENSORS = {"weight": torch.randn(6, 4), "A": torch.randn(2, 4), "B": torch.randn(6, 2)}


def delta(call, inputs, held):
    """x (W + B A)^T + x A^T A"""
    change = call(aten.mm.default, (held["B"], held["A"]))
    whole = call(aten.linear.default, (inputs[0], call(aten.add.Tensor, (held["weight"], change))))
    thin = call(aten.linear.default, (inputs[0], held["A"]))
    return call(aten.cat.default, ([whole, thin], -1))


def made():
    found = lifted(delta, TENSORS, X)
    slots = {name: node for node, name in found.names.items() if name != "weight"}
    return found, slots


def expected(x, a, b):
    return torch.cat([x @ (TENSORS["weight"] + b @ a).T, x @ a.T], -1)


def test_law():
    """What an adapter and weights make is computed; what meets an input as it is stays."""
    graph, slots = made()
    assert [node.name for node in frontier(graph, frozenset(slots.values()))] == ["b_a", "add_tensor"]
    fold(graph, frozenset(slots.values()), {node: graph.tensors[node] for node in slots.values()})
    assert operators(graph) == ["aten.linear.default", "aten.linear.default", "aten.cat.default"]
    assert sorted(graph.names.values()) == ["A", "folded.add_tensor"]


def test_numbers():
    """With the values that are given, which need not be those that the graph was lifted with."""
    graph, slots = made()
    x = torch.randn(2, 3, 4)
    assert_close(run(graph, x), expected(x, TENSORS["A"], TENSORS["B"]))
    other = {slots["A"]: TENSORS["A"], slots["B"]: torch.randn(6, 2)}
    fold(graph, frozenset(slots.values()), other)
    assert_close(run(graph, x), expected(x, TENSORS["A"], other[slots["B"]]))


def test_the_models_own_work_is_left():
    """Without slots nothing is an adapter's."""
    graph, _ = made()
    before = operators(graph)
    fold(graph, frozenset(), {})
    assert operators(graph) == before


def test_twice_is_once():
    graph, slots = made()
    left = frozenset(slots.values())
    fold(graph, left, {node: graph.tensors[node] for node in left})
    before = str(graph.graph)
    left = frozenset(node for node in left if node in graph.tensors)
    fold(graph, left, {node: graph.tensors[node] for node in left})
    drop_unused(graph)
    assert str(graph.graph) == before
