"""What a model is called with where nobody says it, and that programs take it."""

import pytest
import torch
import transformers as hf
from torch.testing import assert_close

from peftc import compiler
from peftc.compiler.trace.example_inputs import LENGTH, ROWS, SAMPLES, drawn_inputs, example_inputs
from tests import zoo

TEXT = (ROWS, LENGTH)
INPUTS = {
    "llama": {"input_ids": TEXT, "attention_mask": TEXT},
    "gpt2": {"input_ids": TEXT, "attention_mask": TEXT},  # it would embed types as tokens
    "bert": {"input_ids": TEXT, "attention_mask": TEXT, "token_type_ids": TEXT},
    "t5": {"input_ids": TEXT, "attention_mask": TEXT, "decoder_input_ids": TEXT},
    "vit": {"pixel_values": (ROWS, 3, 16, 16)},
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_by_kind_of_model(name):
    model = zoo.make(name)
    found = example_inputs(model)
    assert {key: tuple(value.shape) for key, value in found.items()} == INPUTS[name]
    with torch.no_grad():
        model(**found)
        drawn = drawn_inputs(model)
        model(**drawn)
    assert set(drawn) == set(found)
    if "input_ids" in drawn:
        assert len(drawn["input_ids"].unique()) > 4
        assert drawn["attention_mask"].shape == drawn["input_ids"].shape


def test_an_encoder_with_one_type_is_given_none():
    assert "token_type_ids" not in example_inputs(zoo.make("bert", type_vocab_size=1))


def test_sounds():
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8))
    convolutions = dict(conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4)
    model = hf.Wav2Vec2Model(hf.Wav2Vec2Config(**small, **convolutions, num_conv_pos_embedding_groups=2))
    assert {key: tuple(value.shape) for key, value in example_inputs(model).items()} == {
        "input_values": (ROWS, SAMPLES)
    }


def test_nothing_is_known_of_other_modules():
    assert example_inputs(torch.nn.Linear(2, 2)) is None
    assert drawn_inputs(torch.nn.Linear(2, 2)) == {}


def test_a_program_of_an_encoder_takes_the_types_of_tokens(tmp_path):
    adapted = compiler.apply(zoo.make("bert"), "adapter a = lora(rank = 2) { on query, value }")
    with torch.no_grad():
        for parameter in adapted.adapter_bank.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.eval().export(tmp_path / "out", format="pt2")
    ids = torch.randint(3, 60, (2, 7))
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types}
    (logits,) = compiler.Artifact.load(tmp_path / "out")("forward", given).values()
    with torch.no_grad():
        assert_close(logits, adapted(**given).logits)
        plain = adapted(**{**given, "token_type_ids": torch.zeros_like(types)}).logits
    assert (logits - plain).abs().max() > 1e-3
