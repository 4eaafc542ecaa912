"""How a graph uses a weight."""

import pytest
import torch

from peftc.passes.expression.apply import Dense, OneHot
from peftc.passes.insert.uses import WeightUse, use_of
from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.pass_manager import Miss
from peftc.passes.plan.site import Site

aten = torch.ops.aten
LINEAR = Site("m", "weight", "linear", 3, 4)
CONV1D = Site("m", "weight", "conv1d", 3, 4, transposed=True)
EMBEDDING = Site("m", "weight", "embedding", 3, 7, transposed=True)


@pytest.fixture
def hand(lab):
    return lab.hand()


def emitting(hand, node):
    return Emit(hand.graph, hand.call(aten.relu.default, node), Origin("test"), like=node)


def test_a_linear(hand):
    x, weight, bias = hand.placeholder("x", 2, 4), hand.attribute("w", 3, 4), hand.attribute("b", 3)
    with_bias, bare = hand.call(aten.linear.default, x, weight, bias), hand.call(aten.linear.default, x, weight)
    assert use_of(with_bias, weight, LINEAR) == WeightUse(with_bias, Dense(x), bias)
    assert use_of(bare, weight, LINEAR) == WeightUse(bare, Dense(x))
    assert use_of(hand.call(aten.linear.default, x, weight, None), weight, LINEAR).bias is None


def test_a_conv1d(hand):
    x, weight, bias = hand.placeholder("x", 2, 4), hand.attribute("w", 4, 3), hand.attribute("b", 3)
    node = hand.call(aten.addmm.default, bias, x, weight)
    assert use_of(node, weight, CONV1D) == WeightUse(node, Dense(x), bias)
    scaled = hand.call(aten.addmm.default, bias, x, weight, beta=2)
    assert isinstance(use_of(scaled, weight, CONV1D), Miss)


def test_an_embedding(hand):
    ids, weight = hand.placeholder("ids", 2, dtype=torch.long), hand.attribute("w", 7, 3)
    node = hand.call(aten.embedding.default, weight, ids, 0)
    assert use_of(node, weight, EMBEDDING) == WeightUse(node, OneHot(ids, (0,)))


@pytest.mark.parametrize("site", [CONV1D, EMBEDDING])
def test_a_use_of_another_kind_is_not_this_sites(site, hand):
    x, weight = hand.placeholder("x", 2, 4), hand.attribute("w", 3, 4)
    missed = use_of(hand.call(aten.linear.default, x, weight), weight, site)
    assert isinstance(missed, Miss)
    assert missed.reason == "the weight is used by aten.linear.default"


def test_a_weight_as_the_activation_of_another_is_no_use(hand):
    weight, other = hand.attribute("w", 3, 4), hand.attribute("v", 5, 4)
    assert isinstance(use_of(hand.call(aten.linear.default, weight, other), weight, LINEAR), Miss)


def test_the_base_without_its_bias(hand, lab):
    x, weight, bias = hand.placeholder("x", 2, 4), hand.attribute("w", 3, 4), hand.attribute("b", 3)
    node = hand.call(aten.linear.default, x, weight, bias)
    emit = emitting(hand, node)
    made = use_of(node, weight, LINEAR).base(emit, weight, Dense(x))
    assert made is not node
    tensors = {"w": torch.randn(3, 4), "b": torch.randn(3)}
    given = torch.randn(2, 4)
    assert torch.equal(lab.run(hand.done(made), tensors, given), given @ tensors["w"].T)


def test_a_base_that_is_there_already_is_not_made_again(hand):
    x, weight = hand.placeholder("x", 2, 4), hand.attribute("w", 3, 4)
    node = hand.call(aten.linear.default, x, weight)
    emit = emitting(hand, node)
    assert use_of(node, weight, LINEAR).base(emit, weight, Dense(x)) is node
    other = use_of(node, weight, LINEAR).base(emit, weight, Dense(hand.placeholder("y", 5, 4)))
    assert other.meta["val"].shape == (5, 3)


def test_the_base_on_rows_of_an_embedding_or_through_a_conv1d(hand):
    ids, table = hand.placeholder("ids", 2, dtype=torch.long), hand.attribute("t", 7, 3)
    looked = hand.call(aten.embedding.default, table, ids)
    emit = emitting(hand, looked)
    more = hand.placeholder("more", 5, dtype=torch.long)
    assert use_of(looked, table, EMBEDDING).base(emit, table, OneHot(more, ())).meta["val"].shape == (5, 3)
    x, weight, bias = hand.placeholder("x", 2, 4), hand.attribute("w", 4, 3), hand.attribute("b", 3)
    node = hand.call(aten.addmm.default, bias, x, weight)
    made = use_of(node, weight, CONV1D).base(emitting(hand, node), weight, Dense(x))
    assert made.target is aten.matmul.default
    assert made.meta["val"].shape == (2, 3)


def test_the_base_computes_in_its_own_type(hand):
    x, weight = hand.placeholder("x", 2, 4), hand.attribute("w", 3, 4, dtype=torch.bfloat16)
    use = WeightUse(x, Dense(x), weight)  # with a bias, so that it is made
    made = use.base(emitting(hand, x), weight, Dense(x))
    assert made.meta["val"].dtype == torch.bfloat16


def test_reading_another_weight_and_bias(hand):
    x, weight, bias = hand.placeholder("x", 2, 4), hand.attribute("w", 3, 4), hand.attribute("b", 3)
    other, more = hand.attribute("w2", 3, 4), hand.attribute("b2", 3)
    node = hand.call(aten.linear.default, x, weight, bias)
    use_of(node, weight, LINEAR).rebase(other, None)
    assert node.args == (x, other, bias)
    use_of(node, other, LINEAR).rebase(weight, more)
    assert node.args == (x, weight, more)
    bare = hand.call(aten.linear.default, x, weight)
    use_of(bare, weight, LINEAR).rebase(other, more)
    assert bare.args == (x, other, more)
