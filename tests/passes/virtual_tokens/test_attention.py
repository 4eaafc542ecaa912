"""Where a graph attends, and what only looks like it."""

import pytest
import torch
from torch import nn

from peftc.passes.ir import pass_manager
from peftc.passes.ir.pass_manager import Miss
from peftc.passes.optimize.clean import Clean
from peftc.passes.virtual_tokens.attention import Attention, attentions

aten = torch.ops.aten


def test_the_operator_and_eager_code(lab):
    graph = lab.graph("Seer")
    pass_manager.run(graph, [Clean()])
    by_operator, by_hand = attentions(graph)
    assert (by_operator.module, by_hand.module) == ("layers.0", "layers.1")
    assert by_operator.node.target is aten.scaled_dot_product_attention.default
    assert by_hand.node.target is aten.matmul.default
    assert by_hand.key_user.target is aten.transpose.int
    assert by_hand.value_user is by_hand.node
    for each in (by_operator, by_hand):
        assert each.mask.target == "mask"
        shapes = {tuple(node.meta["val"].shape)[1::2] for node in (each.query, each.key, each.value)}
        assert shapes == {(2, 4)}
        linears = [node.args[0].args[0].args[1].target for node in (each.query, each.key, each.value)]
        assert linears == [f"{each.module}.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")]


def by_hand(lab, change=None, softmax=-1, transposed=True, dims=(2, 3)):
    """A graph of attention by hand, and the nodes of its parts."""
    hand = lab.hand()
    query, key, value = (hand.placeholder(name, *dims, 5, 4) for name in ("query", "key", "value"))
    mask = hand.placeholder("mask", 1, 1, 5, 5)
    turned = hand.call(aten.transpose.int, key, -1, -2) if transposed else hand.placeholder("turned", *dims, 4, 5)
    scores = hand.call(aten.matmul.default, query, turned)
    scores = change(hand, scores, mask) if change else scores
    weights = hand.call(aten.softmax.int, scores, softmax)
    return hand.done(hand.call(aten.matmul.default, weights, value)), key, mask


CHANGES = {
    "scaled, capped and masked": (
        lambda hand, scores, mask: hand.call(
            aten.add.Tensor, mask, hand.call(aten.tanh.default, hand.call(aten.div.Tensor, scores, 2.0))
        ),
        [0.0],
    ),
    "filled": (
        lambda hand, scores, mask: hand.call(
            aten.masked_fill.Scalar, scores, hand.call(aten.lt.Scalar, mask, 0.0), -1e9
        ),
        [False],
    ),
    "chosen": (
        lambda hand, scores, mask: hand.call(
            aten.where.ScalarOther, hand.call(aten.ge.Scalar, mask, 0.0), scores, -1e9
        ),
        [True],
    ),
    "twice": (
        lambda hand, scores, mask: hand.call(aten.add.Tensor, hand.call(aten.add.Tensor, scores, mask), mask),
        [0.0, 0.0],
    ),
    "bare": (lambda hand, scores, mask: scores, []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_masks(lab, change):
    graph, key, _ = by_hand(lab, CHANGES[change][0])
    (found,) = attentions(graph)
    assert isinstance(found, Attention)
    assert found.key is key
    assert [each.seen for each in found.masks] == CHANGES[change][1]


MISSES = {
    "the softmax is not over the last axis": {"softmax": 2},
    "the keys are not transposed, they go through turned": {"transposed": False},
    "scores are multiplied by a tensor": {"change": lambda hand, s, mask: hand.call(aten.mul.Tensor, s, mask)},
    "scores go through aten.exp.default": {"change": lambda hand, s, mask: hand.call(aten.exp.default, s)},
    "scores go through mask": {"change": lambda hand, s, mask: hand.call(aten.add.Tensor, mask, mask)},
}


@pytest.mark.parametrize("reason", MISSES)
def test_refusals_say_why(lab, reason):
    graph, *_ = by_hand(lab, **MISSES[reason])
    (missed,) = attentions(graph)
    assert isinstance(missed, Miss)
    assert missed.reason == reason


def test_a_softmax_that_weighs_nothing_is_none(lab):
    class Router(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x, -1).topk(2).values

    assert attentions(lab.trace(Router(), torch.zeros(2, 3, 4))) == []
