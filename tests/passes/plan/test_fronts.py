from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from peftc.passes.plan.fronts import Heads, fronts, heads_of
from tests.passes.quantized.storages import STORES

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}


def meta(make):
    with torch.device("meta"):
        return make()


def llama(**more):
    config = transformers.LlamaConfig(**SIZES, **{"num_key_value_heads": 2, **more})
    return meta(lambda: transformers.LlamaForCausalLM(config))


def gpt2():
    return meta(
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4))
    )


def t5():
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=4
    )
    return meta(lambda: transformers.T5ForConditionalGeneration(config))


def by_kind(model):
    found = {}
    for site in fronts(model):
        found.setdefault(site.kind, []).append(site)
    return found


def test_a_decoder():
    found = by_kind(llama())
    (prompt,), (cache,) = found["prompt"], found["cache"]
    assert (prompt.name, prompt.weight, prompt.tied) == ("@prompt", "model.embed_tokens.weight", ())
    assert (prompt.out_features, prompt.in_features, prompt.transposed) == (16, 40, True)
    assert (prompt.layers, prompt.heads, prompt.stacks) == (3, 2, 1)
    assert (cache.name, cache.weight, cache.stacks) == ("@cache", "", 1)
    assert (cache.out_features, cache.in_features, cache.layers, cache.heads) == (2 * 3 * 8, 8, 3, 2)
    assert [each.name for each in found["attention"]] == [f"model.layers.{index}.self_attn" for index in range(3)]
    assert {(each.out_features, each.in_features, each.layers, each.heads) for each in found["attention"]} == {
        (16, 16, 3, 2)
    }


def test_a_tied_embedding_knows_its_other_names():
    (prompt,) = by_kind(llama(tie_word_embeddings=True))["prompt"]
    assert prompt.tied == ("lm_head.weight",)


def test_packed_attention():
    found = by_kind(gpt2())
    assert [each.name for each in found["attention"]] == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert {each.out_features for each in found["attention"]} == {16}, "a Conv1D is stored the other way round"
    assert (found["cache"][0].in_features, found["cache"][0].out_features) == (16, 2 * 2 * 16)


@pytest.mark.parametrize("name", ["nf4", "torchao int4", "hqq 4"])
def test_attention_whose_weights_are_quantized(name):
    attention = nn.ModuleDict({each: nn.Identity() for each in ("k_proj", "v_proj", "o_proj")})
    attention["q_proj"] = STORES[name](nn.Linear(64, 32))
    ((site,),) = by_kind(nn.ModuleDict({"attn": attention})).values()
    assert (site.name, site.in_features, site.dtype) == ("attn", 64, torch.float32)


def test_packed_attention_to_another_sequence_is_none():
    """Keys and values of another model's states: nothing of the text stands beside a prompt there."""
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=4, add_cross_attention=True)
    found = by_kind(meta(lambda: transformers.GPT2LMHeadModel(config)))
    assert [each.name for each in found["attention"]] == ["transformer.h.0.attn"]


def test_an_encoder_beside_a_decoder():
    found = by_kind(t5())
    (prompt,), (cache,) = found["prompt"], found["cache"]
    assert (prompt.stacks, cache.stacks) == (2, 2)
    assert (cache.layers, cache.heads, cache.in_features) == (3, 4, 32), "those of the decoder"
    assert "attention" not in found, "its projections have other names"
    assert set(prompt.tied) == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}


def test_types_follow_the_weights():
    model = llama().to(torch.bfloat16)
    assert {site.dtype for site in fronts(model)} == {torch.bfloat16}
    assert {site.device.type for site in fronts(model)} == {"meta"}


@pytest.mark.parametrize("scale", [2.5, torch.tensor(2.5)])
def test_a_scale_of_the_embedding(scale):
    model = nn.Module()
    model.embed = nn.Embedding(9, 4)
    model.get_input_embeddings = lambda: model.embed
    model.embed.embed_scale = scale
    (prompt,) = fronts(model)
    assert prompt.scale == 2.5
    model.embed.bfloat16()
    model.embed.embed_scale = torch.tensor(1.001) if isinstance(scale, torch.Tensor) else 1.001
    assert fronts(model)[0].scale == (1.0 if isinstance(scale, torch.Tensor) else 1.001), "as the weight's type has it"


def test_models_that_embed_no_tokens():
    assert fronts(nn.Linear(2, 3)) == ()
    for get in (
        lambda: nn.Linear(2, 3),
        lambda: nn.Embedding(2, 3),
        lambda: (_ for _ in ()).throw(NotImplementedError),
    ):
        model = nn.Linear(2, 3)
        model.get_input_embeddings = get
        assert fronts(model) == (), "no embedding, or none of the model's modules"


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16}, Heads(2, 4, 4)),
        (
            {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 16},
            Heads(2, 1, 4),
        ),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "head_dim": 3}, Heads(2, 4, 3)),
        (
            {"is_encoder_decoder": True, "num_layers": 2, "decoder_layers": 5, "num_attention_heads": 2, "d_model": 8},
            Heads(5, 2, 4),
        ),
        (
            {
                "is_encoder_decoder": True,
                "num_layers": 2,
                "num_decoder_layers": 6,
                "decoder_attention_heads": 1,
                "d_kv": 7,
            },
            Heads(6, 1, 7),
        ),
        (
            {"is_encoder_decoder": False, "num_layers": 2, "decoder_layers": 5, "num_attention_heads": 2, "d_model": 8},
            Heads(2, 2, 4),
        ),
        ({"num_hidden_layers": True, "num_attention_heads": 2, "d_model": 8}, None),
        ({"num_hidden_layers": 2, "num_attention_heads": [2, 4], "d_model": 8}, None),
        ({"num_hidden_layers": 2, "num_attention_heads": 4}, None),
        ({}, None),
    ],
)
def test_heads(said, found):
    assert heads_of(SimpleNamespace(**said)) == found


def test_heads_of_the_text_of_a_config_of_several():
    text = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, hidden_size=16)
    asked = []
    outer = SimpleNamespace(num_hidden_layers=9, get_text_config=lambda decoder: asked.append(decoder) or text)
    assert heads_of(outer) == Heads(2, 4, 4)
    assert asked == [True]
    outer.is_encoder_decoder, outer.decoder_layers = True, 3
    assert heads_of(outer) == Heads(3, 4, 4), "what the whole config says of the decoder comes first"
    assert heads_of(None) is None
    assert Heads(2, 4, 4).width == 16


def test_layers_that_differ_in_their_heads_have_none_in_common():
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlamaConfig(**sizes)
    assert heads_of(config) == Heads(2, 2, 8)
    config.per_layer_config = {1: {"head_dim": 16}}
    assert heads_of(config) is None
    config.per_layer_config = {1: {"intermediate_size": 8}}
    assert heads_of(config) == Heads(2, 2, 8)
