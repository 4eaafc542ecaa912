import pytest
import torch

from peftc.compiler.pipeline.lower import copy_graph
from peftc.passes.ir import values
from peftc.passes.ir.infer import infer
from peftc.passes.ir.values import refresh, wrong_value

aten = torch.ops.aten


@pytest.fixture
def graph(lab):
    hand = lab.hand()
    x, weight = hand.placeholder("x", 2, 4), hand.attribute("w", 4, 5)
    product = hand.call(aten.mm.default, x, weight)
    return hand.done(hand.call(aten.relu.default, product), product)


@pytest.fixture
def inferred(monkeypatch):
    """The operators that were asked for."""
    asked = []

    def ask(operator, *rest):
        asked.append(operator)
        return infer(operator, *rest)

    monkeypatch.setattr(values, "inferred_type", ask)
    return asked


def wrong(graph, full=False):
    return [each for node in graph.nodes if (each := wrong_value(node, full=full))]


def node_of(graph, target):
    (node,) = graph.find_nodes(op="call_function", target=target)
    return node


def shaped(node, *shape, **options):
    with node.meta["val"].fake_mode:
        return torch.empty(shape, **options)


def test_what_was_found_right_is_not_looked_at_again_not_even_in_a_copy(graph, inferred):
    assert wrong(graph) == []
    assert inferred == [aten.mm.default, aten.relu.default]
    assert wrong(graph) == wrong(copy_graph(graph)) == []
    assert len(inferred) == 2
    assert wrong(graph, full=True) == []
    assert len(inferred) == 4


@pytest.mark.parametrize("what", ["value", "operand", "target", "argument"])
def test_what_changed_is_looked_at(what, graph, inferred):
    assert wrong(graph) == []
    inferred.clear()
    relu, product = node_of(graph, aten.relu.default), node_of(graph, aten.mm.default)
    match what:
        case "value":
            relu.meta["val"] = shaped(relu, 2, 5)
        case "operand":
            product.meta["val"] = shaped(product, 2, 5)
        case "target":
            relu.target = aten.neg.default
        case "argument":
            relu.args = (product.args[0],)
            relu.meta["val"] = shaped(relu, 2, 4)
    assert wrong(graph) == []
    assert len(inferred) == (2 if what == "operand" else 1)


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ((2, 6), {}, "float32[2, 6] on cpu"),
        ((2, 5, 1), {}, "float32[2, 5, 1] on cpu"),
        ((2, 5), {"dtype": torch.float64}, "float64[2, 5] on cpu"),
        ((2, 5), {"device": "meta"}, "float32[2, 5] on meta"),
    ],
)
def test_a_wrong_value_is_told(shape, options, said, graph):
    product = node_of(graph, aten.mm.default)
    product.meta["val"] = shaped(product, *shape, **options)
    found = wrong(graph)
    assert found[0] == f"node mm_default holds {said}, but aten.mm.default gives float32[2, 5] on cpu"
    assert len(found) == 2, "and so does what reads it, which holds what it held"


def test_an_operand_that_is_not_taken_is_told(graph):
    product = node_of(graph, aten.mm.default)
    product.args = (product.args[1], product.args[0])
    (found,) = wrong(graph)
    assert found.startswith("node mm_default calls aten.mm.default with what it does not take: ")


def test_refresh_gives_what_is_behind_a_change_its_value(graph):
    assert refresh(graph) == 0
    x = next(iter(graph.nodes))
    x.meta["val"] = shaped(x, 7, 4)
    assert len(wrong(graph)) == 1
    assert refresh(graph) == 2
    assert wrong(graph, full=True) == []
    assert node_of(graph, aten.relu.default).meta["val"].shape == (7, 5)


def test_refresh_leaves_values_that_are_right_the_objects_they_are(graph):
    before = [node.meta["val"] for node in graph.nodes if node.op != "output"]
    assert refresh(graph) == 0
    assert all(one is node.meta["val"] for one, node in zip(before, graph.nodes, strict=False))
