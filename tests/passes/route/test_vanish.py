import pytest
import torch

from peftc.passes.route.vanish import simplify, vanishes

aten = torch.ops.aten


@pytest.fixture
def hand(lab):
    return lab.hand()


@pytest.fixture
def parts(hand):
    x, b = hand.placeholder("x", 3, 4), hand.attribute("slots.p0__a.B", 4, 4)
    member = hand.attribute("slots.p0__a.member", dtype=torch.bool)
    return x, b, member, {b, member}


MADE = {
    "linear": (lambda call, x, b: call(aten.linear.default, x, b), True),
    "scaled": (lambda call, x, b: call(aten.mul.Tensor, call(aten.linear.default, x, b), x), True),
    "turned": (lambda call, x, b: call(aten.transpose.int, call(aten.matmul.default, x, b), 0, 1), True),
    "both of two": (lambda call, x, b: call(aten.add.Tensor, *[call(aten.mm.default, x, b)] * 2), True),
    "one of two": (lambda call, x, b: call(aten.add.Tensor, call(aten.mm.default, x, b), x), False),
    "biased": (lambda call, x, b: call(aten.linear.default, x, b, call(aten.select.int, x, 0, 0)), False),
    "divided by it": (lambda call, x, b: call(aten.div.Tensor, x, call(aten.select.int, b, 0, 0)), False),
    "a function": (lambda call, x, b: call(aten.cos.default, call(aten.mm.default, x, b)), False),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_zero_where_adapters_are(name, hand, parts):
    """The rule against the numbers."""
    x, b, _, fixed = parts
    make, wanted = MADE[name]
    node = make(hand.call, x, b)
    assert vanishes(node, fixed) is wanted

    value = make(lambda op, *args: op(*args), torch.randn(3, 4), torch.zeros(4, 4))
    assert (not value.isnan().any() and not value.any()) is wanted


def told_apart(hand, parts, made, before):
    _, _, member, fixed = parts
    graph = hand.done(hand.call(aten.where.self, member, made, before))
    simplify(graph, fixed)
    return any(node.target is aten.where.self for node in graph.nodes)


def test_a_sum_needs_no_telling_apart(hand, parts):
    x, b, _, _ = parts
    once = hand.call(aten.add.Tensor, x, hand.call(aten.mm.default, x, b))
    assert not told_apart(hand, parts, hand.call(aten.add.Tensor, once, hand.call(aten.mm.default, x, b)), x)


def test_another_value_does(hand, parts):
    x, b, _, _ = parts
    assert told_apart(hand, parts, hand.call(aten.mm.default, x, b), x)


def test_a_sum_with_what_does_not_vanish_does(hand, parts):
    x, _, _, _ = parts
    assert told_apart(hand, parts, hand.call(aten.add.Tensor, x, x), x)
