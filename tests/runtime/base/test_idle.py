"""What a model does without, by name."""

import pytest
from torch import nn

from peftc.runtime.base.idle import idle_names
from tests import zoo


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama", "model.rotary_emb.inv_freq"),
        ("llama", "model.layers.7.self_attn.rotary_emb.inv_freq"),
        ("llama", "model.layers.0.self_attn.rotary_emb.cos_cached"),
        ("llama", "v_head.summary.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("bert", "bert.embeddings.position_ids"),
    ],
)
def test_idle(model, name):
    assert idle_names(zoo.make(model))(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.7.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "score.weight",
        "inv_freq",
        "head.v_head.weight",
        "model.v_head",
    ],
)
def test_not_idle(name):
    assert not idle_names(zoo.make("llama"))(name)


def test_a_head_of_the_models_own_counts():
    assert not idle_names(nn.ModuleDict({"v_head": nn.Linear(2, 1)}))("v_head.summary.weight")
