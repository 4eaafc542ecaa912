"""A quantized base in half precision is trained with the rest in float32; the user's model is left alone."""

import functools
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers.trainer import validate_quantization_for_training

from peftc import compiler
from peftc.passes.quantized.schemes.known import packed_modules
from tests.matrix import wide
from tests.quantized_models import IDS, assert_same, dense, logits, move, plain_kernels, quantize, stored

SPEC = "adapter a = lora(rank = 2) { on **.q_proj }"


@functools.cache
def half(kind: str) -> Any:
    """A bfloat16 base: 8-bit OPT, with biases, or 4-bit Llama whose head is its embedding."""
    return quantize(dense("opt") if kind == "int8" else dense("llama", tied=True), kind, torch.bfloat16)


def types(model: Any) -> dict[str, torch.dtype]:
    found = model.named_parameters(remove_duplicate=False)
    return {name: each.dtype for name, each in found if not name.startswith("adapter_bank")}


def floating(model: Any) -> set[torch.dtype]:
    return {each for each in types(model).values() if each.is_floating_point}


@pytest.mark.parametrize("kind", wide(["nf4", "int8"], ["nf4"]))
def test_what_is_not_packed_is_held_in_float32(kind):
    base = half(kind)
    before, theirs = stored(base), types(base)
    assert torch.bfloat16 in theirs.values()
    adapted = compiler.apply(base, SPEC)
    assert floating(adapted) == {torch.float32}
    assert {name: each.shape for name, each in base.named_parameters()} == {
        name: each.shape for name, each in adapted.named_parameters() if not name.startswith("adapter_bank")
    }
    assert adapted.lm_head.weight is adapted.get_input_embeddings().weight
    assert adapted.is_quantized
    validate_quantization_for_training(adapted)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(base)
    adapted.train()
    loss = adapted(input_ids=IDS, labels=IDS, use_cache=False).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(each.grad.dtype == torch.float32 for each in adapted.adapter_bank.parameters())
    adapted.eval()
    assert types(adapted.unload()) == theirs
    assert types(adapted.get_base_model()) == types(adapted)
    packed_again = adapted.merge_and_unload(quantized="requantize")
    assert types(packed_again) == theirs
    assert floating(adapted.merge_and_unload(quantized="dequantize")) == {torch.bfloat16}
    assert_same(stored(base), before)
    assert_same(stored(adapted.unload()), before)


@pytest.mark.parametrize("kind", wide(["nf4", "int8"], ["int8"]))
def test_it_can_be_left_as_it_is(kind):
    adapted = compiler.apply(half(kind), SPEC, prepare_for_kbit_training=False).eval()
    assert types(adapted) == types(half(kind))
    assert logits(adapted).dtype == torch.bfloat16
    with torch.no_grad():
        assert_close(logits(adapted), logits(plain_kernels(adapted.unload())), rtol=0, atol=0.0)


def test_a_checkpoint_is_prepared_only_to_be_trained(tmp_path):
    base = half("nf4")
    adapted = move(compiler.apply(base, SPEC))
    adapted.save_pretrained(tmp_path)
    assert floating(compiler.load(base, tmp_path)) == {torch.bfloat16}
    assert floating(compiler.load(base, tmp_path, is_trainable=True)) == {torch.float32}
    left = compiler.load(base, tmp_path, is_trainable=True, prepare_for_kbit_training=False)
    assert floating(left) == {torch.bfloat16}


def test_an_adapter_that_is_added_later_trains_in_float32_too():
    adapted = compiler.apply(half("int8"), SPEC)
    adapted.add_adapter("adapter b = lora(rank = 2) { on **.q_proj  bias all  train lm_head }")
    assert {each.dtype for each in adapted.adapter_bank.parameters()} == {torch.float32}


def test_a_dense_base_is_not_touched():
    base = dense("llama", tied=True)
    half = type(base)(base.config).to(torch.bfloat16)
    adapted = compiler.apply(half, SPEC)
    assert floating(adapted) == {torch.bfloat16}
    assert not packed_modules(adapted)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_weights_count_by_their_logical_size(kind, capsys):
    adapted = compiler.apply(half(kind), SPEC)
    model = dense("opt") if kind == "int8" else dense("llama", tied=True)
    trained = sum(each.numel() for each in adapted.adapter_bank.parameters())
    total = sum(each.numel() for each in model.parameters()) + trained
    assert adapted.get_nb_trainable_parameters() == (trained, total)
    adapted.print_trainable_parameters()
    assert f"trainable params: {trained:,d} || all params: {total:,d} ||" in capsys.readouterr().out
