from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc.passes.insert.insert_delta import InsertDelta, UnfitError
from peftc.passes.ir import pass_manager
from peftc.passes.optimize.clean import Clean
from peftc.passes.virtual_tokens.insert_attention import InsertAttention

SPEC = "adapter a = adaption_prompt(length = 3)"
LAST = "adapter a = adaption_prompt(length = 3, layers = 1)"
LORA = "adapter b = lora(rank = 2, alpha = 2) { on q_proj, k_proj, v_proj, o_proj }"
IDS = torch.tensor([[0, 5, 2, 6, 2], [1, 1, 5, 0, 3]])
MASK = torch.zeros(2, 1, 5, 5)


def inserted(lab, *specs):
    active = lab.active("Seer", *specs)
    graph = lab.graph("Seer")
    insert = InsertAttention(active.structure, active.slot_value)
    steps = [Clean(), insert, InsertDelta(active.structure, active.slot_value, False)]
    return graph, active, insert, pass_manager.run(graph, steps).changes["insert-attention"]


def projected(active, layer, index, name, x):
    """A projection with what LoRA at position 1 adds, if it is there."""
    module = getattr(layer, name)
    site = f"layers.{index}.{name}"
    return module(x) + (x @ active.delta(1, site, 1.0).T if len(active.plans) > 1 else 0)


def by_hand(model, active, ids, layers=(0, 1)):
    """The model as a person would write it, with prompts in these layers."""
    hidden = model.tokens(ids) + model.position_embeddings(torch.arange(ids.shape[1]))
    for index, layer in enumerate(model.layers):
        names = ("q_proj", "k_proj", "v_proj")
        query, key, value = (split(projected(active, layer, index, each, hidden)) for each in names)
        seen = (query @ key.mT / 2).softmax(-1) @ value
        out = projected(active, layer, index, "o_proj", seen.transpose(1, 2).flatten(2))
        if index in layers:
            prompt, gate = (active.tensor(0, f"layers.{index}", role) for role in "Pg")
            weights = gate * (query @ split(layer.k_proj(prompt)).mT / 2).softmax(-1)
            out = out + layer.o_proj((weights @ split(layer.v_proj(prompt))).transpose(1, 2).flatten(2))
        hidden = hidden + out
    return hidden


def split(x):
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


def test_golden(lab, golden):
    graph, _, _, change = inserted(lab, LAST)
    assert change.made > 0
    golden("passes/virtual_tokens/insert_attention.txt", lab.show(graph))


@pytest.mark.parametrize(("specs", "layers"), [((SPEC,), (0, 1)), ((LAST,), (1,)), ((SPEC, LORA), (0, 1))])
def test_numbers(lab, specs, layers):
    model = lab.model("Seer")
    graph, active, *_ = inserted(lab, *specs)
    got = lab.run(graph, lab.tensors("Seer") | active.tensors, IDS, MASK)
    assert_close(got, by_hand(model, active, IDS, layers), rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        assert_close(got, by_hand(model, active, IDS, ()))


def test_twice_is_once(lab):
    graph, _, insert, _ = inserted(lab, SPEC)
    before = lab.show(graph)
    assert insert.run(graph).made == 0
    assert lab.show(graph) == before


class Blind(nn.Module):
    """Has what an attention module has, and weighs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(hidden) * self.k_proj(hidden) + self.v_proj(hidden))


class Inside(nn.Module):
    """Holds a module of the name that a plan names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), Blind()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](x)


def test_attention_that_is_not_there_is_refused(lab):
    active = lab.active("Seer", LAST)
    graph = lab.trace(Inside(), torch.zeros(2, 5, 8))
    with pytest.raises(UnfitError) as refused:
        InsertAttention(active.structure, active.slot_value).run(graph)
    assert (refused.value.site.module, refused.value.reason) == (
        "layers.1",
        "its attention is not found in the graph",
    )


def test_attention_that_is_not_understood_is_refused(lab):
    active = lab.active("Seer", LAST)
    graph = lab.graph("Seer")
    (softmax,) = graph.find_nodes(op="call_function", target=torch.ops.aten.softmax.int)
    softmax.args = (softmax.args[0], 2)
    with pytest.raises(UnfitError, match="the softmax is not over the last axis"):
        InsertAttention(active.structure, active.slot_value).run(graph)


def test_other_sizes_are_refused(lab):
    active = lab.active("Seer", LAST)
    front = active.structure.fronts[0]
    fronts = (replace(front, site=replace(front.site, out_features=6)),)
    with pytest.raises(UnfitError, match="its output is not hidden states"):
        InsertAttention(replace(active.structure, fronts=fronts), active.slot_value).run(lab.graph("Seer"))


def test_a_graph_of_another_part_is_left_alone(lab):
    active = lab.active("Seer", SPEC)
    assert InsertAttention(active.structure, active.slot_value).run(lab.graph("Two")).made == 0
