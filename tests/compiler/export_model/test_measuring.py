import dataclasses

import pytest
import torch
import transformers

from peftc import compiler
from peftc.compiler.export_model import entries, programs
from peftc.compiler.export_model.measuring import measured


@pytest.fixture(scope="module")
def adapted():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    made = compiler.apply(transformers.T5ForConditionalGeneration(config), "adapter a = ia3").eval()
    for each in made.adapter_bank.parameters():
        torch.nn.init.normal_(each)
    return made


@pytest.fixture(scope="module")
def made(adapted):
    limits = {"max_batch_size": None, "max_length": None}
    calls = entries.entered(adapted, "generate", None)
    return [programs.make(adapted, each, "inputs", ["a"], **limits) for each in calls]


def wrong(program):
    """The program with logits of twice the size."""
    changed = dict(program.program.state_dict)
    norm = "decoder.final_layer_norm.weight"
    changed[norm] = torch.nn.Parameter(changed[norm] * 2, requires_grad=False)
    copied = dataclasses.replace(program)
    object.__setattr__(copied, "program", Stated(program.program, changed))
    return copied


class Stated:
    """A program with other tensors."""

    def __init__(self, program, state_dict):
        self.graph, self.graph_signature, self.state_dict = program.graph, program.graph_signature, state_dict


def test_what_is_right_has_next_to_no_drift(adapted, made):
    drift = measured(adapted, made, "inputs", ["a"], None)
    assert drift.relative < 1e-5
    assert drift.agreement == 1


@pytest.mark.parametrize("place", [0, 1], ids=["prefill", "decode"])
def test_each_program_is_looked_at(adapted, made, place):
    altered = [wrong(each) if index == place else each for index, each in enumerate(made)]
    drift = measured(adapted, altered, "inputs", ["a"], None)
    assert drift.relative > 1e-2
