"""A trace serves calls inside and outside of autocast and inference mode, whichever came first."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch.testing import assert_close

from peftc import compiler
from tests import zoo

INPUTS = {"input_ids": torch.arange(5, 17).reshape(2, 6), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, torch.nn.Module, Path]:
    model = zoo.make("llama")
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules="all-linear")).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    directory = tmp_path_factory.mktemp("autocast")
    theirs.save_pretrained(directory)
    return model, theirs, directory


def under(model: torch.nn.Module, autocast: bool) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), torch.no_grad():
        return model(**INPUTS).logits


@pytest.mark.parametrize("first", [True, False])
def test_either_order(pair: tuple[torch.nn.Module, torch.nn.Module, Path], first: bool) -> None:
    model, theirs, directory = pair
    ours = compiler.load(model, directory)
    for autocast in (first, not first):
        found = under(ours, autocast)
        assert found.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert_close(found, under(theirs, autocast))
        assert not torch.equal(found, under(model, autocast))


def test_inference_mode_first(pair: tuple[torch.nn.Module, torch.nn.Module, Path]) -> None:
    model, theirs, directory = pair
    ours = compiler.load(model, directory, is_trainable=True)
    with torch.inference_mode():
        assert_close(ours(**INPUTS).logits, theirs(**INPUTS).logits)
    ours(**INPUTS).logits.sum().backward()
    assert all(each.grad is not None for each in ours.parameters() if each.requires_grad)


def test_gradients_under_autocast(pair: tuple[torch.nn.Module, torch.nn.Module, Path]) -> None:
    model, theirs, directory = pair
    ours = compiler.load(model, directory, is_trainable=True)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), directory, is_trainable=True).eval()
    for each in (ours, theirs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            each(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    mine = ours.get_parameter("adapter_bank.default.model__layers__0__self_attn__q_proj.A").grad
    its = dict(theirs.named_parameters())["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"].grad
    assert mine is not None
    assert_close(mine, its, rtol=0.05, atol=1e-4)
