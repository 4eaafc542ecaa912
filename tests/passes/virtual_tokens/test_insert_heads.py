from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc.passes.insert.insert_delta import UnfitError
from peftc.passes.ir import pass_manager
from peftc.passes.optimize.clean import Clean
from peftc.passes.virtual_tokens.insert_heads import InsertHeads

SPEC = "adapter a = prefix(length = 3)"
IDS = torch.tensor([[0, 5, 2, 6, 2], [1, 1, 5, 0, 3]])
MASK = torch.where(torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(2)) > 0.3, 0.0, -1e9)
MASK[..., 0] = 0.0


def inserted(lab, *specs, graph=None):
    active = lab.active("Seer", *(specs or (SPEC,)))
    graph = lab.graph("Seer") if graph is None else graph
    insert = InsertHeads(active.structure, active.slot_value)
    change = pass_manager.run(graph, [Clean(), insert]).changes["insert-heads"]
    return graph, active, insert, change


def by_hand(model, prefix, ids, mask):
    """The model as a person would write it with `prefix` `[length, slots, heads, size]` in front."""
    length = prefix.shape[0]
    hidden = model.tokens(ids) + model.position_embeddings(torch.arange(length, length + ids.shape[1]))
    seen = nn.functional.pad(mask, (length, 0))
    for index, layer in enumerate(model.layers):
        query, key, value = (
            each(hidden).unflatten(-1, (2, 4)).transpose(1, 2) for each in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        own = prefix.permute(1, 2, 0, 3)[2 * index : 2 * index + 2, None].expand(-1, len(ids), -1, -1, -1)
        key, value = torch.cat([own[0], key], 2), torch.cat([own[1], value], 2)
        weights = (query @ key.mT / 2 + seen).softmax(-1)
        hidden = hidden + layer.o_proj((weights @ value).transpose(1, 2).flatten(2))
    return hidden


def test_golden(lab, golden):
    graph, _, _, change = inserted(lab)
    assert change.made > 0
    golden("passes/virtual_tokens/insert_heads.txt", lab.show(graph))


@pytest.mark.parametrize("specs", [(SPEC,), (SPEC, "adapter b = prefix(length = 2)")])
def test_numbers(lab, specs):
    model = lab.model("Seer")
    graph, active, *_ = inserted(lab, *specs)
    got = lab.run(graph, lab.tensors("Seer") | active.tensors, IDS, MASK)
    prefix = torch.cat([active.tensor(position, "@cache", "P") for position in range(len(specs))])
    assert_close(got, by_hand(model, prefix.unflatten(1, (4, 2, 4)), IDS, MASK))
    with pytest.raises(AssertionError):
        assert_close(got, model(IDS, MASK))


def test_twice_is_once(lab):
    graph, _, insert, _ = inserted(lab)
    before = lab.show(graph)
    assert insert.run(graph).made == 0
    assert lab.show(graph) == before


def test_another_number_of_layers_is_refused(lab):
    active = lab.active("Seer", SPEC)
    front = active.structure.fronts[0]
    for change, reason in (
        ({"layers": 3}, "the model has 3 layers, and its graph attends 2 times"),
        ({"heads": 4}, "layers.0 has 2 heads of 4 numbers, not 4 of 2 as the config says"),
    ):
        fronts = (replace(front, site=replace(front.site, **change)),)
        with pytest.raises(UnfitError) as refused:
            InsertHeads(replace(active.structure, fronts=fronts), active.slot_value).run(lab.graph("Seer"))
        assert refused.value.reason == reason


def test_what_is_not_understood_is_named(lab):
    graph = lab.graph("Seer")
    (softmax,) = graph.find_nodes(op="call_function", target=torch.ops.aten.softmax.int)
    softmax.args = (softmax.args[0], 2)
    with pytest.raises(UnfitError, match=r"attends 1 times; the softmax is not over the last axis \(at softmax\)"):
        inserted(lab, graph=graph)


def test_too_few_positions_are_refused(lab):
    with pytest.raises(UnfitError, match="the model has 16 positions, and the prefix takes 16 of them"):
        inserted(lab, "adapter a = prefix(length = 16)")


def test_attention_that_is_causal_by_a_flag_is_refused(lab):
    graph = lab.graph("Seer")
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    node.args, node.kwargs = node.args[:3], {"is_causal": True}
    with pytest.raises(UnfitError, match=r"layers\.0 hides what comes later without a mask"):
        inserted(lab, graph=graph)
