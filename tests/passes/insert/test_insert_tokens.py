from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc.passes.insert.insert_delta import InsertDelta
from peftc.passes.insert.insert_tokens import InsertTokens, Lookup
from peftc.passes.ir import pass_manager
from peftc.passes.ir.pass_manager import Miss
from peftc.passes.ir.split_tied_weights import SplitOwners
from peftc.passes.optimize.add_in_place import AddInPlace
from peftc.passes.optimize.clean import Clean
from peftc.passes.plan.sites import tied_names
from peftc.passes.plan.structure import rows_slot

aten = torch.ops.aten

TOKENS = "adapter a = trainable_tokens { tokens [5, 2] in embed, head }"
ONE = "adapter a = trainable_tokens { tokens [%s] in embed }"
IDS = torch.tensor([[0, 5, 2, 6, 2], [1, 1, 5, 0, 3]])


def inserted(lab, *specs, name="Tied", deltas=False):
    active = lab.active(name, *specs)
    graph = lab.graph(name)
    insert = InsertTokens(active.structure, active.slot_value)
    steps = [Clean(), SplitOwners(tied_names(lab.model(name)))]
    steps += [InsertDelta(active.structure, active.slot_value, False)] if deltas else []
    change = pass_manager.run(graph, [*steps, insert]).changes["insert-tokens"]
    return graph, active, insert, change


def replaced(active, weight, module="embed", position=0):
    """The weight with an adapter's rows in it."""
    slot, new = rows_slot(position, module), weight.detach().clone()
    new[active.tensors[f"{slot}.ids"]] = active.tensors[f"{slot}.rows"][active.tensors[f"{slot}.order"]]
    return new


def run(lab, graph, active, ids=IDS, name="Tied"):
    return lab.run(graph, lab.tensors(name) | active.tensors, ids)


def test_golden(lab, golden):
    graph, _, _, change = inserted(lab, TOKENS)
    assert change.made > 0
    golden("passes/insert/insert_tokens.txt", lab.show(graph))


def test_numbers(lab):
    model = lab.model("Tied")
    graph, active, *_ = inserted(lab, TOKENS)
    embed, head = (replaced(active, model.embed.weight, module) for module in ("embed", "head"))
    got = run(lab, graph, active)
    assert_close(got, torch.tanh(embed[IDS]) @ head.T)
    with pytest.raises(AssertionError):
        assert_close(got, model(IDS))


@pytest.mark.parametrize("ids", ["0", "6", "3", "6, 0, 3"])
def test_every_place_of_a_token(lab, ids):
    graph, active, *_ = inserted(lab, ONE % ids, name="Lookup")
    model, every = lab.model("Lookup"), torch.arange(7)[None]
    embed = replaced(active, model.embed.weight)
    assert_close(run(lab, graph, active, every, "Lookup"), model.bag(model.conv(embed[every])))


def test_the_padding_token_gets_no_gradient_where_it_is_looked_up(lab):
    graph, active, *_ = inserted(lab, ONE % "3, 0", name="Lookup")
    rows = active.tensors[rows_slot(0, "embed") + ".rows"].requires_grad_()
    run(lab, graph, active, torch.tensor([[0, 3, 3, 0]]), "Lookup").sum().backward()
    assert rows.grad[0].abs().max() > 0
    assert rows.grad[1].abs().max() == 0


def test_two_adapters_with_different_tokens(lab):
    graph, active, *_ = inserted(lab, ONE % "5, 2", ONE % "1", name="Lookup")
    model = lab.model("Lookup")
    embed = replaced(active, replaced(active, model.embed.weight), position=1)
    assert_close(run(lab, graph, active, IDS, "Lookup"), model.bag(model.conv(embed[IDS])))


@pytest.mark.parametrize("method", ["lora(rank = 2)", "dora(rank = 2)"])
def test_what_another_adapter_makes_of_the_weight_starts_from_the_rows(lab, method):
    graph, active, *_ = inserted(lab, f"adapter d = {method} {{ on embed }}", ONE % "5, 2", name="Lookup", deltas=True)
    model = lab.model("Lookup")
    table = replaced(active, model.embed.weight, position=1)
    added = active.delta(0, "embed", 4.0).T  # alpha / rank
    weight = (table + added).T
    if method.startswith("dora"):
        weight = weight / weight.norm(dim=1, keepdim=True) * active.tensor(0, "embed", "m").reshape(-1, 1)
    assert_close(run(lab, graph, active, IDS, "Lookup"), model.bag(model.conv(weight.T[IDS])))


def test_the_weight_itself_is_replaced_only_where_it_must_be(lab):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)

        def forward(self, ids):
            return self.embed(ids) @ self.embed.weight.sum(0)

    model = Whole()
    graph = lab.copy(lab.trace(model, IDS))
    active = lab.active("Lookup", ONE % "5, 2")
    weight = next(iter(graph.find_nodes(op="get_attr")))
    insert = InsertTokens(active.structure, active.slot_value)
    kinds = {type(insert.check(use, weight)) for use in weight.users}
    assert kinds == {Lookup, Miss}
    pass_manager.run(graph, [Clean(), insert])
    table = replaced(active, model.embed.weight)
    got = lab.run(graph, dict(model.named_parameters()) | active.tensors, IDS)
    assert_close(got, table[IDS] @ table.sum(0))


def test_twice_is_once(lab):
    graph, _, insert, _ = inserted(lab, TOKENS)
    once = lab.show(graph)
    assert insert.run(graph).made == 0
    assert lab.show(graph) == once


def test_nothing_as_large_as_the_weight_or_the_logits_is_made(lab):
    graph, _, insert, _ = inserted(lab, TOKENS)
    AddInPlace().run(graph)
    ours = [node for node in graph.nodes if insert._is_ours(node) and node.op == "call_function"]
    assert len(ours) > 5
    for node in ours:
        assert "7" not in map(str, node.meta["val"].shape) or node.target is aten.index_add_.default


def test_adding_in_place_needs_a_fresh_output_with_one_reader(lab):
    graph, active, *_ = inserted(lab, TOKENS)
    before = run(lab, graph, active)
    assert AddInPlace().run(graph).made == 1
    assert AddInPlace().run(graph).made == 0
    assert_close(run(lab, graph, active), before)

    hand = lab.hand()
    logits, ids = hand.placeholder("logits", 3, 7), hand.placeholder("ids", 2, dtype=torch.int64)
    added = hand.call(aten.index_add.default, logits, -1, ids, hand.placeholder("change", 3, 2))
    added.meta["peftc"] = next(iter(graph.find_nodes(op="call_function", target=aten.index_add_.default))).meta["peftc"]
    assert AddInPlace().check(added) == Miss("what it adds to has no output of its own", added)


def test_rows_in_another_type(lab):
    active = lab.active("Tied", TOKENS)
    rows = tuple(replace(each, dtype=torch.float64) for each in active.structure.rows)

    def slot_value(position, site, role, near):
        value = active.slot_value(position, site, role, near)
        return value.double() if value.is_floating_point() else value

    graph = lab.graph("Tied")
    InsertTokens(replace(active.structure, rows=rows), slot_value).run(graph)
    (output,) = graph.find_nodes(op="output")
    assert output.args[0][0].meta["val"].dtype == torch.float32
    added = list(graph.find_nodes(op="call_function", target=aten.index_add.default))
    assert [each.meta["val"].dtype for each in added] == [torch.float32]
