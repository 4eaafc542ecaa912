import pytest
import torch
from torch.testing import assert_close

from peftc.compiler.pipeline.lower import copy_graph
from peftc.passes.insert.insert_delta import InsertDelta
from peftc.passes.ir import pass_manager
from peftc.passes.ir.emit import Origin
from peftc.passes.ir.pass_manager import Change
from peftc.passes.optimize.clean import Clean
from peftc.passes.optimize.hoist import PIECES, Hoist, kept_nodes

FIRST = "adapter a = loha(rank = 2) { on first }"
BOTH = "adapter a = dora(rank = 2) { on first, second }"


def hoisted(lab, name, *specs, transient=(), dense=()):
    active = lab.active(name, *specs)
    graph = lab.graph(name)
    insert = InsertDelta(active.structure, active.slot_value, False, frozenset(dense))
    change = pass_manager.run(graph, [Clean(), insert, Hoist(frozenset(transient))]).changes["hoist"]
    return graph, change.prologue, active, change


def test_golden(lab, golden):
    graph, prologue, _, change = hoisted(lab, "Two", FIRST)
    assert (change.made, change.removed) == (1, 7)
    golden("passes/optimize/hoist.txt", f"{lab.show(graph)}\n{lab.show(prologue)}")


def test_golden_where_the_whole_weight_is_kept(lab, golden):
    graph, prologue, _, change = hoisted(lab, "Two", FIRST, dense=("first",))
    assert change.made == 1
    golden("passes/optimize/hoist_weight.txt", f"{lab.show(graph)}\n{lab.show(prologue)}")


@pytest.mark.parametrize("spec", [FIRST, BOTH])
@pytest.mark.parametrize("dense", [(), ("first",)])
def test_numbers(spec, dense, lab):
    """The two graphs, one after the other, compute what the one before them did."""
    x = torch.randn(3, 2, 4)
    active = lab.active("Two", spec)
    plain = lab.graph("Two")
    pass_manager.run(plain, [Clean(), InsertDelta(active.structure, active.slot_value, False)])
    tensors = lab.tensors("Two") | active.tensors
    expected = lab.run(plain, tensors, x)
    graph, prologue, *_ = hoisted(lab, "Two", spec, dense=dense)
    assert not any(node.op == "placeholder" for node in prologue.nodes)
    kept = {}
    for index, made in enumerate(prologue.output_node().args[0]):
        alone = copy_graph(prologue)
        alone.output_node().args = ((list(alone.nodes)[list(prologue.nodes).index(made)],),)
        kept[f"{PIECES}.p{index}"] = lab.run(alone, tensors)
    assert_close(lab.run(graph, tensors | kept, x), expected)
    with pytest.raises(AssertionError):
        assert_close(expected, lab.model("Two")(x))
    assert {str(node.target) for node in graph.find_nodes(op="get_attr")} >= set(kept)


def test_what_an_activation_goes_into_is_left(lab):
    """LoRA pushed has nothing that is worth keeping: its pieces are the parameters themselves."""
    graph, prologue, _, change = hoisted(lab, "Two", "adapter a = lora(rank = 2) { on first }")
    assert change.made == 0
    assert prologue is None
    assert not graph.find_nodes(op="get_attr", target=f"{PIECES}.p0")


def test_transient_sites_are_left(lab):
    """Where W' is computed in every call, it would take a weight's memory to keep it."""
    before, _, _, _ = hoisted(lab, "Two", FIRST, dense=("first",), transient=("first",))
    active = lab.active("Two", FIRST)
    same = lab.graph("Two")
    pass_manager.run(same, [Clean(), InsertDelta(active.structure, active.slot_value, False, frozenset({"first"}))])
    assert lab.show(before) == lab.show(same)
    _, _, _, change = hoisted(lab, "Two", BOTH, transient=("first",))
    assert change.made == hoisted(lab, "Two", BOTH)[3].made / 2


def test_the_models_own_work_on_its_weights_is_left(lab):
    """A Conv1D's or a tied head's transposed weight is no adapter's: the base runs as it did."""
    for name in ("Lookup", "Experts", "Tied"):
        graph = lab.graph(name)
        before = lab.show(graph)
        assert Hoist(frozenset()).run(graph).made == 0
        assert lab.show(graph) == before


@pytest.mark.parametrize("spec", [FIRST, BOTH])
def test_twice_is_once(spec, lab):
    graph, _, _, change = hoisted(lab, "Two", spec)
    assert change.made
    once = lab.show(graph)
    assert Hoist(frozenset()).run(graph) == Change()
    assert lab.show(graph) == once


def test_a_view_alone_is_not_worth_keeping(lab):
    hand = lab.hand()
    weight = hand.attribute("w", 4, 6)
    turned = hand.call(torch.ops.aten.transpose.int, weight, -1, -2)
    copied = hand.call(torch.ops.aten.reshape.default, turned, [24])
    hand.done(turned, copied)
    for node in (turned, copied):
        node.meta["peftc"] = Origin("test", "site")
    assert kept_nodes(hand.graph) == {copied}  # a reshape that has to copy
