import pytest
import torch

from peftc.passes.ir.emit import Origin
from peftc.passes.ir.stages import Stage
from peftc.passes.ir.verify import VerifyError, verify

aten = torch.ops.aten


def graph(lab):
    hand = lab.hand()
    x = hand.placeholder("x", 2)
    node = hand.call(aten.relu.default, x)
    node.meta["peftc"] = Origin("some-pass")
    return hand.done(hand.call(aten.neg.default, node))


def relu(graph):
    (node,) = graph.find_nodes(op="call_function", target=aten.relu.default)
    return node


def refused(graph, stage=Stage.CLEANED):
    with pytest.raises(VerifyError) as caught:
        verify(graph, after="some-pass", stage=stage)
    assert caught.value.after == "some-pass"
    assert str(caught.value).startswith("after pass 'some-pass': ")
    assert "%relu_default" in str(caught.value)
    return caught.value.problem


def test_a_whole_graph_passes(lab):
    verify(graph(lab), after="some-pass", stage=Stage.CLEANED)


def test_a_node_without_a_value(lab):
    broken = graph(lab)
    del relu(broken).meta["val"]
    assert refused(broken) == "node relu_default has no value"


@pytest.mark.parametrize("origin", ["some-pass", Origin(""), 3])
def test_a_node_without_an_origin(origin, lab):
    broken = graph(lab)
    relu(broken).meta["peftc"] = origin
    assert refused(broken) == "node relu_default does not say who made it"


def test_an_operator_that_is_not_legal(lab):
    broken = graph(lab)
    relu(broken).target = aten.relu_.default
    problem = refused(broken)
    assert problem == "node relu_default calls aten.relu_.default, which is not legal in a graph that is cleaned"


def test_a_use_before_the_definition(lab):
    broken = graph(lab)
    placeholder = next(iter(broken.nodes))
    relu(broken).append(placeholder)
    assert "used before" in refused(broken)


def test_an_argument_of_another_graph(lab):
    broken, other = graph(lab), graph(lab)
    relu(broken).args = (relu(other),)
    assert refused(broken)
