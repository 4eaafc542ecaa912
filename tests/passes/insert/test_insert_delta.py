import pytest
import torch
from torch.testing import assert_close

from peftc.passes.expression.apply import DropoutError
from peftc.passes.insert.insert_delta import InsertDelta
from peftc.passes.insert.uses import WeightUse
from peftc.passes.ir import pass_manager
from peftc.passes.ir.pass_manager import Miss
from peftc.passes.optimize.clean import Clean

aten = torch.ops.aten
FIRST = "adapter a = lora(rank = 2, alpha = 6) { on first }"
BOTH = "adapter b = lora(rank = 3, alpha = 3, dropout = 0.5) { on all linear }"


def adapted(lab, name, *specs, training=False):
    active = lab.active(name, *specs)
    graph = lab.graph(name)
    insert = InsertDelta(active.structure, active.slot_value, training)
    change = pass_manager.run(graph, [Clean(), insert]).changes["insert-delta"]
    return graph, active, insert, change


def test_golden(lab, golden):
    graph, _, _, change = adapted(lab, "Two", FIRST)
    assert change.made == 7
    golden("passes/insert/insert_delta.txt", lab.show(graph))


def test_golden_where_the_weight_itself_is_replaced(lab, golden):
    graph, *_ = adapted(lab, "Lookup", "adapter a = lora(rank = 2, alpha = 6) { on bag.table }")
    golden("passes/insert/insert_delta_value.txt", lab.show(graph))


def test_golden_while_training(lab, golden):
    graph, *_ = adapted(lab, "Two", "adapter a = lora(rank = 2, dropout = 0.5) { on second }", training=True)
    golden("passes/insert/insert_delta_dropout.txt", lab.show(graph))


def test_numbers(lab):
    graph, active, *_ = adapted(lab, "Two", FIRST, BOTH)
    x, tensors, model = torch.randn(3, 2, 4), lab.tensors("Two"), lab.model("Two")
    first = model.first.weight + active.delta(0, "first", 3.0) + active.delta(1, "first", 1.0)
    second = model.second.weight + active.delta(1, "second", 1.0)
    expected = torch.relu(x @ first.T + model.first.bias) @ second.T
    got = lab.run(graph, tensors | active.tensors, x)
    assert_close(got, expected)
    with pytest.raises(AssertionError):
        assert_close(got, model(x))


@pytest.mark.parametrize("site", ["embed", "conv", "bag.table"])
def test_numbers_at_every_kind(site, lab):
    graph, active, *_ = adapted(lab, "Lookup", f"adapter a = lora(rank = 2, alpha = 6) {{ on {site} }}")
    ids, model = torch.tensor([[1, 0, 6], [4, 4, 2]]), lab.model("Lookup")
    tensors = {name: each.detach() for name, each in lab.tensors("Lookup").items()}
    changed = dict(tensors)
    stored = active.delta(0, site, 3.0)
    name = site if site == "bag.table" else f"{site}.weight"
    changed[name] = tensors[name] + (stored if site == "bag.table" else stored.T)
    expected = torch.func.functional_call(model, changed, (ids,))
    got = lab.run(graph, tensors | active.tensors, ids)
    assert_close(got, expected)
    with pytest.raises(AssertionError):
        assert_close(got, model(ids))


def test_numbers_at_a_stack_of_experts(lab):
    """PEFT's layout: A is [experts * rank, in], B is [out, rank * experts] with the experts last."""
    graph, active, *_ = adapted(lab, "Experts", "adapter a = lora(rank = 2, alpha = 6) { on stack }")
    x, weight = torch.randn(3, 2, 5), lab.model("Experts").stack
    a, b = active.tensor(0, "stack", "A"), active.tensor(0, "stack", "B")
    delta = torch.stack([b.reshape(4, 2, 3)[:, :, e] @ a.reshape(3, 2, 5)[e] for e in range(3)])
    expected = x @ (weight + 3.0 * delta).transpose(-1, -2)
    assert_close(lab.run(graph, lab.tensors("Experts") | active.tensors, x), expected)


def test_a_tied_weight_is_adapted_at_the_named_use_only(lab):
    graph, active, *_ = adapted(lab, "Tied", "adapter a = lora(rank = 2, alpha = 6) { on head }")
    ids, weight = torch.tensor([[1, 0, 6]]), lab.model("Tied").embed.weight
    expected = torch.tanh(weight[ids]) @ (weight + active.delta(0, "head", 3.0)).T
    assert_close(lab.run(graph, lab.tensors("Tied") | active.tensors, ids), expected)


def test_every_node_says_who_made_it(lab):
    graph, *_ = adapted(lab, "Two", FIRST)
    made = [node for node in graph.nodes if "peftc" in node.meta]
    assert {node.meta["peftc"].site for node in made} == {"first"}
    slots = [node.meta["peftc"] for node in made if node.op == "get_attr"]
    assert {(each.position, each.role) for each in slots} == {(0, "A"), (0, "B"), (0, "s")}
    assert all("nn_module_stack" in node.meta for node in made)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("Two", FIRST),
        ("Lookup", "adapter a = lora(rank = 2) { on embed, conv, bag.table }"),
        ("Tied", "adapter a = lora(rank = 2) { on embed, head }"),
        ("Experts", "adapter a = lora(rank = 2) { on stack }"),
    ],
)
def test_twice_is_once(name, spec, lab):
    graph, _, insert, change = adapted(lab, name, spec)
    assert change.made
    once = lab.show(graph)
    assert insert.run(graph).made == 0
    assert lab.show(graph) == once


def test_no_adapter_is_no_change(lab):
    graph = lab.graph("Two")
    active = lab.active("Two", FIRST)
    empty = type(active.structure)()
    assert InsertDelta(empty, active.slot_value, False).run(graph).made == 0


def test_check_says_how_the_weight_is_used(lab):
    graph, active, insert, _ = adapted(lab, "Lookup", "adapter a = lora(rank = 2) { on embed, bag.table }")
    sites = {each.site.name: each.site for each in active.structure.sites}
    (table,) = (node for node in graph.find_nodes(op="get_attr") if node.target == "bag.table")
    use = next(iter(table.users))
    missed = insert.check(use, table, sites["bag.table"])
    assert isinstance(missed, Miss)
    assert not missed
    assert missed.node is use
    assert missed.reason.startswith("the weight is used by aten.")
    (embed,) = (node for node in graph.find_nodes(op="get_attr") if node.target == "embed.weight")
    (looked,) = graph.find_nodes(op="call_function", target=aten.embedding.default)[:1]
    found = insert.check(looked, embed, sites["embed"])
    assert isinstance(found, WeightUse)
    assert found.node is looked


def test_dropout_is_refused_where_there_is_no_activation_to_drop(lab):
    active = lab.active("Lookup", "adapter a = lora(rank = 2, dropout = 0.5) { on embed }")
    hand = lab.hand()
    weight = hand.attribute("embed.weight", 7, 4)
    graph = hand.done(hand.call(aten.sum.default, weight))
    use = next(iter(weight.users))
    use.meta["nn_module_stack"] = {"a": ("embed", "Embedding")}
    with pytest.raises(DropoutError, match=r"embed: the weight is used by aten\.sum\.default"):
        InsertDelta(active.structure, active.slot_value, True).run(graph)
    assert InsertDelta(active.structure, active.slot_value, False).run(graph).made
