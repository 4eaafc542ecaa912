"""What a quantized base stores packed is the same, bit for bit, before and after all that an adapted model does."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import AdapterError, UsageError
from peftc.passes.quantized.schemes.known import packed_modules
from tests.matrix import wide
from tests.quantized_models import (
    IDS,
    assert_same,
    dense,
    logits,
    move,
    pair,
    quantize,
    stored,
)

LABELS = {"input_ids": IDS, "labels": IDS, "use_cache": False}


def train(adapted):
    adapted.train()
    optimizer = torch.optim.SGD([each for each in adapted.parameters() if each.requires_grad], lr=1e-3)
    adapted(**LABELS).loss.backward()
    assert any(each.grad is not None and each.grad.any() for each in adapted.parameters())
    optimizer.step()
    optimizer.zero_grad()
    adapted.eval()


def checkpointed(adapted):
    adapted.gradient_checkpointing_enable()
    try:
        train(adapted)
    finally:
        adapted.gradient_checkpointing_disable()


def generate(adapted):
    adapted.generate(IDS, max_new_tokens=3, do_sample=False)
    adapted.generate(IDS, max_new_tokens=3, do_sample=False, num_beams=2)


def switch(adapted):
    adapted.set_adapter("b")
    adapted.set_adapter({"a": 0.5, "b": 2.0})
    logits(adapted)
    with adapted.disable_adapter():
        logits(adapted)
    adapted.disable_adapters()
    adapted.enable_adapters()
    adapted.set_adapter("a")


def save_and_load(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    adapted.load_adapter(tmp_path / "b", "c")
    adapted.delete_adapter("c")
    adapted.load_state_dict(adapted.state_dict())


def merge(adapted):
    for quantized in ("requantize", "dequantize"):
        adapted.merge_drift(**LABELS, quantized=quantized)
        adapted.merge_adapter(quantized=quantized)
        logits(adapted)
        adapted.merge_and_unload()
        adapted.unload()
        adapted.unmerge_adapter()
        adapted.merge_and_unload(quantized=quantized)
    adapted.unload()


def fail(adapted):
    for wrong in ("adapter x = lora() { on nothing }", "adapter x = lora() { on **.q_proj  train **.k_proj }"):
        with pytest.raises(AdapterError):
            adapted.add_adapter(wrong)
    for call in (adapted.merge_adapter, adapted.requires_grad_):
        with pytest.raises(UsageError):
            call()


@pytest.mark.parametrize("kind", wide(["nf4", "int8"], ["nf4"]))
def test_packed_bytes_stay_what_they_are(kind, tmp_path):
    base, adapted = pair(kind)
    theirs, ours = stored(base), stored(adapted)
    assert set(theirs) == set(ours)
    steps = {
        "call": logits,
        "train": train,
        "generate": generate,
        "switch": switch,
        "checkpointing": checkpointed,
        "merge": merge,
        "save and load": lambda each: save_and_load(each, tmp_path),
        "refusals": fail,
        "copy": copy.deepcopy,
        "move": lambda each: each.to("cpu"),
        "apply again": lambda _: compiler.apply(base, "adapter z = lora() { on **.q_proj }"),
    }
    for name, step in steps.items():
        step(adapted)
        for model, before in ((base, theirs), (adapted, ours)):
            try:
                assert_same(stored(model), before)
            except AssertionError as error:
                raise AssertionError(f"after {name}") from error


def test_a_failed_apply_changes_nothing():
    base, _ = pair("nf4")
    before = stored(base)
    with pytest.raises(AdapterError):
        compiler.apply(base, "adapter a = lora() { on **.q_proj  train **.k_proj }")
    assert_same(stored(base), before)


@pytest.mark.parametrize("kind", wide(["nf4", "exact"], ["nf4"]))
def test_a_model_that_bitsandbytes_repacked_is_adapted_as_what_it_computes(kind):
    base = quantize(dense("llama"), kind, repacks=True)
    with torch.no_grad():
        logits(base)
    state = base.model.layers[0].self_attn.q_proj.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks on processors with AVX-512 BF16 alone")
    before = stored(base)
    with torch.no_grad():
        wanted = logits(base)
    adapted = compiler.apply(base, "adapter a = lora() { on **.q_proj }").eval()
    # Codes as they were; scales as repacking rounded them, to bfloat16.
    held = packed_modules(adapted)
    for name, each in packed_modules(quantize(dense("llama"), kind)).items():
        codes, scales = held[name].parts
        assert torch.equal(codes, each.parts[0])
        assert torch.equal(scales, scales.to(torch.bfloat16).float())
        assert_close(held[name].unpack(), each.unpack(), rtol=1e-2, atol=1e-3)
    assert_close(logits(adapted), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))
    copy.deepcopy(adapted).merge_and_unload(quantized="requantize")
    move(adapted).state_dict()
    assert_same(stored(base), before)


def test_a_base_that_repacks_itself_later_leaves_the_adapted_model_alone():
    base = quantize(dense("llama"), "nf4", repacks=True)
    adapted = move(compiler.apply(base, "adapter a = lora() { on **.q_proj }")).eval()
    before, wanted = stored(adapted), logits(adapted)
    with torch.no_grad():
        logits(base)
        logits(adapted.unload())
    assert_same(stored(adapted), before)
    assert torch.equal(logits(adapted.to("cpu")), wanted)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_deep_copy_has_storage_of_its_own_and_none_twice(kind):
    _, adapted = pair(kind)
    copied = copy.deepcopy(adapted)
    assert torch.equal(logits(copied), logits(adapted))
    originals = {part.data_ptr() for held in packed_modules(adapted).values() for part in held.parts}
    for held in packed_modules(copied).values():
        assert not originals & {part.data_ptr() for part in held.parts}
        weight = held.module.weight
        if isinstance(weight, bnb.nn.Params4bit):
            assert weight.module is held.module
            assert weight.quant_state is held.module.quant_state
        else:
            assert weight.CB.data_ptr() == weight.data_ptr()
    copied.merge_adapter(quantized="dequantize")
    twice = copy.deepcopy(copied)
    twice.unmerge_adapter()
    assert torch.equal(logits(twice), logits(adapted))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_weights_are_neither_trained_nor_overwritten(kind, golden):
    _, adapted = pair(kind)
    with pytest.raises(UsageError) as training:
        adapted.requires_grad_()
    state = adapted.state_dict()
    name = next(iter(packed_modules(adapted)))
    state[f"{name}.weight"] = state[f"{name}.weight"] ^ 1
    with pytest.raises(UsageError) as loading:
        adapted.load_state_dict(state, strict=False)
    golden(f"quantized/{kind}_packed.txt", f"{training.value}\n{loading.value}\n")
