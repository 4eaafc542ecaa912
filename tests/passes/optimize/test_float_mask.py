import pytest
import torch
from torch.testing import assert_close

from peftc.passes.ir import pass_manager
from peftc.passes.optimize.clean import Clean
from peftc.passes.optimize.float_mask import FloatMask

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def attention(lab, by_name=False, dtype=torch.bool):
    """Two calls that share one mask."""
    hand = lab.hand()
    query = hand.placeholder("query", 2, 2, 3, 4)
    mask = hand.placeholder("mask", 2, 1, 3, 3, dtype=dtype)
    given = {"args": (query, query, query, mask), "kwargs": {"scale": 0.5}}
    if by_name:
        given = {"args": (query, query, query), "kwargs": {"attn_mask": mask, "scale": 0.5}}
    first = hand.call(SDPA, *given["args"], **given["kwargs"])
    return hand.done(hand.call(SDPA, first, *given["args"][1:], **given["kwargs"]))


def inputs():
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    mask[1, 0, 2, 0] = False
    return torch.randn(2, 2, 3, 4), mask


def test_golden(lab, golden):
    graph = attention(lab)
    assert pass_manager.run(graph, [FloatMask()]).changes["float-mask"].made == 1
    golden("passes/optimize/float_mask.txt", lab.show(graph))


@pytest.mark.parametrize("by_name", [False, True])
def test_numbers(by_name, lab):
    graph, given = attention(lab, by_name), inputs()
    before = lab.run(graph, {}, *given)
    pass_manager.run(graph, [FloatMask()])
    assert_close(lab.run(graph, {}, *given), before)
    assert not torch.allclose(lab.run(graph, {}, given[0], torch.ones_like(given[1])), before)


def test_twice_is_once(lab):
    graph = attention(lab)
    FloatMask().run(graph)
    once = lab.show(graph)
    assert FloatMask().run(graph).made == 0
    assert lab.show(graph) == once


def test_a_real_trace(lab):
    graph = lab.graph("Attention")
    x, mask = torch.randn(2, 4, 8), torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    assert pass_manager.run(graph, [Clean(), FloatMask()]).changes["float-mask"].made == 1
    assert_close(lab.run(graph, lab.tensors("Attention"), x, mask), lab.model("Attention")(x, mask))


def test_numbers_and_no_mask_are_left(lab):
    graph = attention(lab, dtype=torch.float32)
    assert FloatMask().run(graph).made == 0
    hand = lab.hand()
    query = hand.placeholder("query", 2, 2, 3, 4)
    graph = hand.done(hand.call(SDPA, query, query, query, None, 0.0, True))
    assert FloatMask().run(graph).made == 0


def test_a_mask_for_each_type(lab):
    hand = lab.hand()
    mask = hand.placeholder("mask", 3, 3, dtype=torch.bool)
    queries = [
        hand.placeholder(f"q{i}", 1, 2, 3, 4, dtype=each) for i, each in enumerate((torch.float32, torch.bfloat16))
    ]
    graph = hand.done(*[hand.call(SDPA, each, each, each, mask) for each in queries])
    assert pass_manager.run(graph, [FloatMask()]).changes["float-mask"].made == 2
    masks = [node.args[3].meta["val"].dtype for node in graph.find_nodes(op="call_function", target=SDPA)]
    assert masks == [torch.float32, torch.bfloat16]


def test_a_row_that_may_look_nowhere(lab):
    """Padding on the left: torch gives zeros there, for either kind of mask."""
    graph, (query, mask) = attention(lab), inputs()
    mask[0, 0, 0] = False
    before = lab.run(graph, {}, query, mask)
    assert torch.isfinite(before).all()
    FloatMask().run(graph)
    assert_close(lab.run(graph, {}, query, mask), before)


def test_a_boolean_mask_is_gone_afterwards(lab):
    for by_name in (False, True):
        (node, *_) = attention(lab, by_name).find_nodes(op="call_function", target=SDPA)
        assert FloatMask().removes(node)
