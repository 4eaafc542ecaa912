import torch
from torch.testing import assert_close

from peftc.passes.ir import pass_manager
from peftc.passes.ir.bodies import module_path
from peftc.passes.ir.split_tied_weights import SplitOwners, owned_name
from peftc.passes.plan.sites import tied_names

aten = torch.ops.aten
NAMES = ("embed.weight", "head.weight")


def tied(lab):
    """As the exporter leaves it: both uses read the weight under its first name."""
    hand = lab.hand()
    weight = hand.attribute("embed.weight", 7, 4)
    ids = hand.placeholder("ids", 3, dtype=torch.long)
    looked = hand.call(aten.embedding.default, weight, ids)
    looked.meta["nn_module_stack"] = {"a": ("", "Tied"), "b": ("embed", "Embedding")}
    result = hand.call(aten.linear.default, looked, weight)
    result.meta["nn_module_stack"] = {"a": ("", "Tied"), "b": ("head@1", "Linear")}
    return hand.done(result)


def split():
    return SplitOwners(dict.fromkeys(NAMES, NAMES))


def test_golden(lab, golden):
    graph = tied(lab)
    pass_manager.run(graph, [split()])
    golden("passes/ir/split_owners.txt", lab.show(graph))


def test_numbers(lab):
    graph, ids = tied(lab), torch.tensor([1, 5, 0])
    weight, other = torch.randn(7, 4), torch.randn(7, 4)
    before = lab.run(graph, {"embed.weight": weight}, ids)
    split().run(graph)
    assert_close(lab.run(graph, {"embed.weight": weight, "head.weight": weight}, ids), before)
    parted = lab.run(graph, {"embed.weight": weight, "head.weight": other}, ids)
    assert_close(parted, weight[ids] @ other.T)


def test_twice_is_once(lab):
    graph = tied(lab)
    assert split().run(graph).made == 1
    assert split().run(graph).made == 0


def test_traces_come_split(lab):
    """The tracer runs the pass itself."""
    graph = lab.graph("Tied")
    assert {str(node.target) for node in graph.find_nodes(op="get_attr")} == {"embed.weight", "head.weight"}
    assert SplitOwners(tied_names(lab.model("Tied"))).run(graph).made == 0


def test_a_weight_that_is_not_tied_is_left(lab):
    graph = lab.graph("Two")
    before = lab.show(graph)
    assert SplitOwners(tied_names(lab.model("Two"))).run(graph).made == 0
    assert lab.show(graph) == before


def test_a_use_outside_every_owner_keeps_the_name_it_has(lab):
    graph = tied(lab)
    use = graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    use.meta["nn_module_stack"] = {"a": ("", "Tied")}
    assert owned_name(use, use.args[1], NAMES) is None
    assert split().run(graph).made == 0


def test_module_path_drops_the_count_of_repeated_calls(lab):
    use = tied(lab).find_nodes(op="call_function", target=aten.linear.default)[0]
    assert module_path(use) == ("", "head")
    assert owned_name(use, use.args[1], NAMES) == "head.weight"


def test_module_path_without_a_stack(lab):
    assert module_path(lab.hand().placeholder("x", 1)) == ()
