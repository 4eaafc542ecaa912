import pytest
import torch
from torch.testing import assert_close

from peftc.passes.ir import pass_manager
from peftc.passes.optimize.clean import Clean
from peftc.passes.optimize.group_heads import GroupHeads, repeated

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def repeat(hand, x, groups=2):
    rows, heads, length, size = x.meta["val"].shape
    unsqueezed = hand.call(aten.unsqueeze.default, x, 2)
    expanded = hand.call(aten.expand.default, unsqueezed, [rows, heads, groups, length, size])
    return hand.call(aten.reshape.default, expanded, [rows, heads * groups, length, size])


def attention(lab):
    hand = lab.hand()
    query = hand.placeholder("query", 2, 4, 3, 8)
    key, value = (repeat(hand, hand.placeholder(name, 2, 2, 3, 8)) for name in ("key", "value"))
    return hand.done(hand.call(SDPA, query, key, value, None, 0.0, True, scale=0.5))


def inputs():
    return torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)


def test_golden(lab, golden):
    graph = attention(lab)
    assert pass_manager.run(graph, [GroupHeads()]).changes["group-heads"].made == 1
    golden("passes/optimize/group_heads.txt", lab.show(graph))


def test_numbers(lab):
    graph, given = attention(lab), inputs()
    before = lab.run(graph, {}, *given)
    GroupHeads().run(graph)
    assert_close(lab.run(graph, {}, *given), before)
    swapped = (given[0], given[1].flip(1), given[2])
    assert not torch.allclose(lab.run(graph, {}, *swapped), before)


def test_twice_is_once(lab):
    graph = attention(lab)
    GroupHeads().run(graph)
    once = lab.show(graph)
    again = GroupHeads().run(graph)
    assert again.made == 0
    assert [miss.reason for miss in again.misses] == ["its keys and values are not repeated, or are by itself"]
    assert lab.show(graph) == once


def test_a_real_trace(lab):
    graph = lab.graph("Attention")
    x, mask = torch.randn(2, 4, 8), torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    pass_manager.run(graph, [Clean(), GroupHeads()])
    assert [node.kwargs.get("enable_gqa") for node in graph.find_nodes(op="call_function", target=SDPA)] == [True] * 2
    assert not graph.find_nodes(op="call_function", target=aten.expand.default)
    assert_close(lab.run(graph, lab.tensors("Attention"), x, mask), lab.model("Attention")(x, mask))


def test_several_readers_of_the_repeated_keys(lab):
    """As when layers share a cache: nobody else loses them."""
    graph, given = attention(lab), inputs()
    (node,) = graph.find_nodes(op="call_function", target=SDPA)
    output = graph.output_node()
    with graph.inserting_before(output):
        extra = graph.call_function(aten.relu.default, (node.args[1],))
    extra.meta["val"] = node.args[1].meta["val"]
    output.args = ((extra,),)
    output.prev.replace_all_uses_with(output.prev)
    before = lab.run(graph, {}, *given)
    GroupHeads().run(graph)
    assert_close(lab.run(graph, {}, *given), before)


@pytest.mark.parametrize("case", ["input", "not expanded", "not unsqueezed", "other axis", "merged otherwise"])
def test_what_is_not_repeated(case, lab):
    hand = lab.hand()
    x = hand.placeholder("x", 2, 2, 3, 8)
    match case:
        case "input":
            node = x
        case "not expanded":
            node = hand.call(aten.reshape.default, x, [2, 4, 3, 4])
        case "not unsqueezed":
            wide = hand.placeholder("wide", 2, 2, 1, 3, 8)
            node = hand.call(aten.expand.default, wide, [2, 2, 2, 3, 8])
            node = hand.call(aten.reshape.default, node, [2, 4, 3, 8])
        case "other axis":  # heads repeated as h0 h1 h0 h1
            node = hand.call(aten.unsqueeze.default, x, 1)
            node = hand.call(aten.expand.default, node, [2, 2, 2, 3, 8])
            node = hand.call(aten.reshape.default, node, [2, 4, 3, 8])
        case _:
            node = hand.call(aten.unsqueeze.default, x, 2)
            node = hand.call(aten.expand.default, node, [2, 2, 2, 3, 8])
            node = hand.call(aten.reshape.default, node, [2, 2, 6, 8])
    assert repeated(node) is None


def test_only_one_of_two_repeated_is_left(lab):
    hand = lab.hand()
    query, value = hand.placeholder("query", 2, 4, 3, 8), hand.placeholder("value", 2, 4, 3, 8)
    key = repeat(hand, hand.placeholder("key", 2, 2, 3, 8))
    graph = hand.done(hand.call(SDPA, query, key, value))
    assert GroupHeads().run(graph).made == 0


def test_repeated_finds_the_source(lab):
    hand = lab.hand()
    x = hand.placeholder("x", 2, 2, 3, 8)
    assert repeated(repeat(hand, x)) is x
    assert repeated(None) is None
