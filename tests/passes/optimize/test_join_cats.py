import pytest
import torch
from torch.testing import assert_close

from peftc.passes.ir import pass_manager
from peftc.passes.ir.emit import Origin
from peftc.passes.optimize.clean import Clean
from peftc.passes.optimize.join_cats import JoinCats
from peftc.passes.virtual_tokens.insert_prefix import InsertPrefix

aten = torch.ops.aten


def behind(lab, axis=2, outer=2, own=True, reader=None):
    """A prefix before a cache, both before new keys, and the size of what is before these."""
    hand = lab.hand()
    prefix, past, new = (hand.placeholder(name, 2, 3, size, 4) for name, size in (("p", 5), ("past", 4), ("new", 4)))
    inner = hand.call(aten.cat.default, [prefix, past], axis)
    if own:
        inner.meta["peftc"] = Origin("insert-prefix", "@cache")
    new = new if outer in (2, -2) else inner
    whole = hand.call(aten.cat.default, [inner, new], outer)
    sizes = [hand.call(aten.sym_size.int, inner, each) for each in (0, 2, -2)]
    return hand.done(whole, *sizes, *([hand.call(reader, inner)] if reader else []))


def inputs():
    return {name: torch.randn(2, 3, size, 4) for name, size in (("p", 5), ("past", 2), ("new", 1))}


def test_golden(lab, golden):
    graph = behind(lab)
    change = pass_manager.run(graph, [JoinCats()]).changes["join-cats"]
    assert change.removed == 4, "the inner one, and three sizes of it"
    golden("passes/optimize/join_cats.txt", lab.show(graph))


@pytest.mark.parametrize(("axis", "outer"), [(2, 2), (-2, 2), (2, -2)])
def test_numbers(axis, outer, lab):
    graph, given = behind(lab, axis, outer), inputs()
    before = lab.results(graph, {}, **given)
    JoinCats().run(graph)
    whole, *sizes = lab.results(graph, {}, **given)
    assert_close(whole, before[0])
    assert sizes == [2, 7, 7]
    assert len(graph.find_nodes(op="call_function", target=aten.cat.default)) == 1
    assert not torch.equal(whole, lab.results(graph, {}, **given | {"p": torch.zeros(2, 3, 5, 4)})[0])


def test_twice_is_once(lab):
    graph = behind(lab)
    JoinCats().run(graph)
    once = lab.show(graph)
    assert JoinCats().run(graph) == pass_manager.Change()
    assert lab.show(graph) == once


OTHERWISE = {
    "the model's": ({"own": False}, "not an adapter's"),
    "axis": ({"outer": 1}, "which is no concatenation along its axis"),
    "reader": ({"reader": aten.clone.default}, "read by clone"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_is_read_otherwise_is_left(case, lab):
    otherwise, reason = OTHERWISE[case]
    graph = behind(lab, **otherwise)
    before = lab.show(graph)
    change = JoinCats().run(graph)
    assert change == pass_manager.Change()
    assert reason in change.misses[0].reason
    assert lab.show(graph) == before


def test_an_output_is_left(lab):
    hand = lab.hand()
    x = hand.placeholder("x", 2, 3)
    inner = hand.call(aten.cat.default, [x, x])
    inner.meta["peftc"] = Origin("test")
    assert JoinCats().run(hand.done(inner)) == pass_manager.Change()


def test_three_deep(lab):
    """An axis that is not given is the first."""
    hand = lab.hand()
    x = hand.placeholder("x", 2, 3)
    inner = hand.call(aten.cat.default, [x, x])
    middle = hand.call(aten.cat.default, [x, inner], 0)
    for each in (inner, middle):
        each.meta["peftc"] = Origin("test")
    graph = hand.done(hand.call(aten.cat.default, [middle, x, middle]))
    given = torch.randn(2, 3)
    assert JoinCats().run(graph).removed == 2
    (node,) = graph.find_nodes(op="call_function", target=aten.cat.default)
    assert_close(lab.run(graph, {}, given), given.repeat(7, 1))
    assert len(node.args[0]) == 7


def test_a_prefix_in_a_real_trace(lab):
    active, graph = lab.active("Reader", "adapter a = prefix(length = 3)"), lab.graph("Reader")
    insert = InsertPrefix(active.structure, active.slot_value, 2)
    pass_manager.run(graph, [Clean(), insert])
    given = {"input_ids": torch.tensor([[1, 2]]), "position_ids": torch.tensor([[4, 5]])}
    given |= {"attention_mask": torch.ones(1, 6, dtype=torch.long)}
    given |= {name: torch.randn(1, 2, 4, 4) for name in ("past_0_key", "past_0_value")}
    tensors = lab.tensors("Reader") | active.tensors
    before = lab.results(graph, tensors, **given)
    cats = len(graph.find_nodes(op="call_function", target=aten.cat.default))
    pass_manager.run(graph, [JoinCats()])
    assert_close(lab.results(graph, tensors, **given), before)
    assert len(graph.find_nodes(op="call_function", target=aten.cat.default)) == cats - 2
