import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc.passes.insert.insert_delta import UnfitError
from peftc.passes.ir import pass_manager
from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.optimize.clean import Clean
from peftc.passes.plan.structure import LOG_WEIGHT
from peftc.passes.virtual_tokens.attention import attentions
from peftc.passes.virtual_tokens.attention_bias import Weighing, cached_attentions
from peftc.passes.virtual_tokens.insert_heads import InsertHeads
from peftc.passes.virtual_tokens.insert_prefix import InsertPrefix

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SPECS = ("adapter a = prefix(length = 3)", "adapter b = prefix(length = 2)")
WEIGHTS = [(0.5,), (0.25, 3.0), (1.0, 0.5), (2.0, 1.0)]
IDS = torch.tensor([[0, 5, 2, 6, 2], [1, 1, 5, 0, 3]])
MASK = torch.where(torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(2)) > 0.3, 0.0, -1e9)
MASK[..., 0] = 0.0


def active_with(lab, name, weights):
    return lab.active(name, *SPECS[: len(weights)], weights=weights)


def bias(weights, keys):
    """What is added to the score of each key, prefixes first."""
    given = [math.log(weight) for weight, length in zip(weights, (3, 2), strict=False) for _ in range(length)]
    return torch.tensor(given + [0.0] * (keys - len(given)))


def in_heads(lab, weights, graph=None):
    active, graph = active_with(lab, "Seer", weights), lab.graph("Seer") if graph is None else graph
    pass_manager.run(graph, [Clean(), InsertHeads(active.structure, active.slot_value)])
    return graph, active


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["float", "boolean", "none"])
def test_numbers(kind, weights, lab):
    """Through an operator and through a softmax, as a person would write it."""
    model, graph = lab.model("Seer"), lab.graph("Seer")
    (operator,) = graph.find_nodes(op="call_function", target=SDPA)
    mask = MASK if kind == "float" else torch.zeros_like(MASK)
    if kind == "none":
        operator.args, operator.kwargs = operator.args[:3], {}
    if kind == "boolean":
        emit = Emit(graph, operator, Origin(""), like=operator)
        seen = emit.call(aten.eq.Scalar, next(each for each in graph.nodes if each.name == "mask"), 0.0)
        seen.meta.pop("peftc")
        operator.args, operator.kwargs = operator.args[:3], {"attn_mask": seen}
        mask = MASK
    graph, active = in_heads(lab, weights, graph)
    got = lab.run(graph, lab.tensors("Seer") | active.tensors, IDS, mask)
    prefix = torch.cat([active.tensor(position, "@cache", "P") for position in range(len(weights))])
    wanted = by_hand(model, prefix.unflatten(1, (4, 2, 4)), mask, bias(weights, len(prefix) + 5))
    assert_close(got, wanted)
    plain = by_hand(model, prefix.unflatten(1, (4, 2, 4)), mask, torch.zeros(len(prefix) + 5))
    with pytest.raises(AssertionError):
        assert_close(got, plain)


def by_hand(model, prefix, mask, added):
    length = prefix.shape[0]
    hidden = model.tokens(IDS) + model.position_embeddings(torch.arange(length, length + IDS.shape[1]))
    for index, layer in enumerate(model.layers):
        query, key, value = (
            each(hidden).unflatten(-1, (2, 4)).transpose(1, 2) for each in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        own = prefix.permute(1, 2, 0, 3)[2 * index : 2 * index + 2, None].expand(-1, len(IDS), -1, -1, -1)
        key, value = torch.cat([own[0], key], 2), torch.cat([own[1], value], 2)
        scores = query @ key.mT / 2 + nn.functional.pad(mask, (length, 0)) + added
        hidden = hidden + layer.o_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    return hidden


def test_weights_of_one_leave_the_graph(lab):
    plain, active = in_heads(lab, (1.0, 1.0))
    assert not any(each.weighted for each in active.structure.fronts)
    assert "log" not in lab.show(plain)


def test_a_weight_of_zero_is_left_out(lab):
    assert [each.term.position for each in active_with(lab, "Seer", (0.0, 0.5)).structure.fronts] == [1]


def test_behind_a_cache(lab):
    """Attention finds the weights behind keys that were cached, and a mask that comes in is still widened."""
    weights = (0.25, 3.0)
    given = {"input_ids": IDS, "position_ids": torch.arange(4, 9).repeat(2, 1)}
    given |= {"attention_mask": torch.zeros(2, 1, 5, 9), "target_labels": IDS.flip(1)}
    given |= {"past_0_key": torch.randn(2, 2, 4, 4), "past_0_value": torch.randn(2, 2, 4, 4)}
    active, graph = active_with(lab, "Judge", weights), lab.graph("Judge")
    pass_manager.run(graph, [Clean(), InsertPrefix(active.structure, active.slot_value, 2)])
    tensors = lab.tensors("Judge") | active.tensors
    got = lab.results(graph, tensors, **given)
    # The plain graph, told the same by the mask of its caller.
    plain, without = lab.graph("Judge"), lab.active("Judge", *SPECS)
    model = lab.model("Judge")
    prefix = torch.cat([active.tensor(position, "@cache", "P") for position in range(2)])
    lead = [each.unflatten(1, (2, 4)).transpose(0, 1)[None].expand(2, -1, -1, -1) for each in prefix.split(8, 1)]
    told = given | {"position_ids": given["position_ids"] + 5, "labels": given["target_labels"]}
    del told["target_labels"]
    told["attention_mask"] = bias(weights, 14).expand(2, 1, 5, 14)
    told |= {
        f"past_0_{name}": torch.cat([own, given[f"past_0_{name}"]], 2)
        for name, own in zip(("key", "value"), lead, strict=True)
    }
    assert_close(got[0], model(**told)[0])
    pass_manager.run(plain, [Clean(), InsertPrefix(without.structure, without.slot_value, 2)])
    with pytest.raises(AssertionError):
        assert_close(got[0], lab.results(plain, tensors, **given)[0])


def test_layers_share_a_mask(lab):
    """One mask of two operators is changed once."""
    active, graph = active_with(lab, "Seer", (0.5,)), lab.graph("Attention")
    found = attentions(graph)
    start = Emit(graph, found[0].node, Origin("weigh"), like=found[0].node)
    Weighing(start, active.structure.fronts, active.slot_value, found[0].node).all(found)
    before, (one, other) = {each.mask for each in found}, (each.mask for each in attentions(graph))
    assert len(found) == 2
    assert one is other
    assert one not in before
    assert one.meta["val"].dtype == torch.float32
    logs = [each for each in graph.find_nodes(op="get_attr") if str(each.target).endswith(LOG_WEIGHT)]
    assert len(logs) == 1


def test_attention_that_is_not_found_is_refused(lab):
    active, graph = active_with(lab, "Reader", (0.5,)), lab.graph("Reader")
    (softmax,) = graph.find_nodes(op="call_function", target=aten.softmax.int)
    softmax.args = (softmax.args[0], 2)
    own = [each for each in graph.find_nodes(op="placeholder") if str(each.target).startswith("past")]
    with pytest.raises(UnfitError, match="the attention of 0 of its 1 layers is found, so it takes no weight"):
        cached_attentions(graph, own, active.structure.fronts[0])
