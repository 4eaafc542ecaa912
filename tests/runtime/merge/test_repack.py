"""Merging into weights that are stored packed: refused, or packed again, or dense; measured, and undone exactly."""

from collections.abc import Iterator
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from peftc import compiler
from peftc.grammar.diagnostics import UsageError
from peftc.passes.quantized.packed_operators import QUANTIZED_LINEAR
from peftc.passes.quantized.schemes.known import packed, packed_modules
from tests.matrix import wide
from tests.quantized_models import (
    IDS,
    SPEC,
    assert_same,
    copy_with,
    dense,
    logits,
    move,
    pair,
    plain_kernels,
    quantize,
    stored,
)

HOW = ("requantize", "dequantize")
SCALE = 2.0  # LoRA's alpha over its rank


@pytest.fixture(autouse=True)
def unmerged() -> Iterator[None]:
    """A test that fails leaves the models that are shared as it found them."""
    yield
    for _, adapted in map(pair, ("nf4", "int8")):
        if adapted._adapter_state.displaced:
            adapted.unmerge_adapter()


def delta(adapted: Any, site: str, dtype: torch.dtype) -> torch.Tensor:
    """What LoRA `a` adds to a weight, from what it saves."""
    saved = adapted.adapter_state_dict("a")
    down, up = (saved[f"base_model.model.{site}.lora_{each}.weight"].detach().to(dtype) for each in "AB")
    return SCALE * up @ down


def through_bitsandbytes(module: Any, change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight that bitsandbytes unpacks, and what it makes of that weight and a change when it packs them again."""
    if isinstance(module, torch.nn.Linear) and hasattr(module.weight, "quant_state"):
        codes, state = module.weight.data, module.weight.quant_state
        weight = bnb.dequantize_4bit(codes, state)
        merged = (weight.to(change.dtype) + change).to(state.dtype)
        again = bnb.quantize_4bit(merged, blocksize=64, compress_statistics=state.nested, quant_type="nf4")
        return weight, bnb.dequantize_4bit(*again)
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    weight = bnb.int8_vectorwise_dequant(module.weight.data, scales)
    codes, again, _ = bnb.int8_vectorwise_quant((weight + change).to(torch.float16))
    return weight, bnb.int8_vectorwise_dequant(codes, again)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merging_asks_what_becomes_of_packed_weights(kind, golden):
    _, adapted = pair(kind)
    before, calls = stored(adapted), (adapted.merge_adapter, adapted.merge_drift, adapted.merge_and_unload)
    said = set()
    for call in calls:
        with pytest.raises(UsageError) as refused:
            call()
        said.add(str(refused.value))
    assert len(said) == 1
    with pytest.raises(UsageError) as misspelt:
        adapted.merge_adapter(quantized="dequantise")
    golden(f"quantized/{kind}_merge.txt", f"{said.pop()}\n{misspelt.value}\n")
    assert_same(stored(adapted), before)
    assert not adapted._adapter_state.displaced


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_drift_report_is_what_merging_does(kind, how):
    base, adapted = pair(kind)
    before, unmerged = stored(adapted), logits(adapted)
    report = adapted.merge_drift(input_ids=IDS, use_cache=False, quantized=how)
    adapted.merge_adapter(quantized=how)
    merged = logits(adapted)
    assert bool(packed_modules(adapted)) is (how == "requantize")
    assert len(report.tensors) == 2
    for tensor in report.tensors:
        site = tensor.name.removesuffix(".weight")
        weight, again = through_bitsandbytes(base.get_submodule(site), delta(adapted, site, torch.float32))
        exact = weight.double() + delta(adapted, site, torch.float64)
        held = packed(adapted.get_submodule(site))
        now = adapted.get_submodule(site).weight if held is None else held.unpack()
        if how == "requantize":
            assert tensor.dtype == kind
            assert_close(now, again, rtol=0, atol=1e-6)
        else:
            assert tensor.dtype == "float32"
            assert_close(now.double(), exact, rtol=0, atol=1e-6)
        assert tensor.largest == pytest.approx(float((now.double() - exact).abs().max()), rel=1e-4, abs=1e-8)
        assert (tensor.largest > 1e-4) is (how == "requantize")
    assert report.outputs.largest == float((merged.double() - unmerged.double()).abs().max()) > 0
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), unmerged)
    assert_same(stored(adapted), before)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", wide(["nf4", "int8"], ["nf4"]))
def test_a_merged_model_answers_saves_and_is_undone(kind, how, tmp_path):
    _, adapted = pair(kind)
    before = logits(adapted)
    fingerprint, count = adapted.base_fingerprint(), adapted.get_nb_trainable_parameters()
    plain = adapted.merge_and_unload(quantized=how)
    adapted.merge_adapter(quantized=how)
    merged = logits(adapted)
    assert not torch.equal(merged, before)
    assert adapted.base_fingerprint() == fingerprint
    assert adapted.get_nb_trainable_parameters()[1] == count[1]
    with adapted.disable_adapter():
        bare = logits(adapted)
    assert torch.equal(logits(adapted), merged)
    from_merged = adapted.merge_and_unload()
    tokens = adapted.generate(IDS, max_new_tokens=3, do_sample=False)
    with pytest.warns(UserWarning, match="unmerged before"):
        adapted.set_adapter("a")
    assert torch.equal(logits(adapted), before)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), bare)
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for each in (plain, from_merged, again):
        plain_kernels(each)
        assert getattr(each, "is_quantized", False) is (how == "requantize")
        assert bool(packed_modules(each)) is (how == "requantize")
        with torch.no_grad():
            assert_close(logits(each), merged, rtol=0, atol=1e-5)
    assert torch.equal(plain.generate(IDS, max_new_tokens=3, do_sample=False), tokens)


@pytest.mark.parametrize("kind", wide(["nf4", "int8"], ["int8"]))
def test_what_is_traced_while_the_weights_are_dense_serves_packed_ones(kind):
    base, known = pair(kind)
    wanted = logits(known)
    adapted = compiler.apply(base, SPEC).eval()
    adapted.adapter_bank.load_state_dict(known.adapter_bank.state_dict())
    adapted.merge_adapter(quantized="dequantize")
    logits(adapted)
    adapted.unmerge_adapter()
    adapted._adapter_state.engine.run("", {"input_ids": IDS})
    traces = adapted._adapter_state.engine._traces
    assert len(traces) == 1
    graph = next(iter(traces.values())).graph
    assert len(graph.find_nodes(op="call_function", target=QUANTIZED_LINEAR)) == len(packed_modules(base))
    assert torch.equal(logits(adapted), wanted)
    adapted.merge_adapter(quantized="dequantize")
    with pytest.warns(UserWarning, match="unmerged before"):
        adapted.add_adapter("adapter c = lora(rank = 2) { on **.k_proj }")
    assert all(each.site.packing is not None for each in adapted.adapter_plan("c").sites)
    assert set(map(len, (packed_modules(adapted), packed_modules(base)))) == {len(packed_modules(base))}


@pytest.mark.parametrize("how", HOW)
def test_a_safe_merge_refuses_what_is_not_finite(how):
    base, _ = pair("nf4")
    adapted = compiler.apply(base, "adapter a = lora() { on **.q_proj }")
    for parameter in adapted.adapter_bank.parameters():
        nn.init.constant_(parameter, float("nan"))
    before = stored(adapted)
    with pytest.raises(UsageError, match=r"E520.*q_proj\.weight"):
        adapted.merge_adapter(safe_merge=True, quantized=how)
    assert_same(stored(adapted), before)


NOTHING_PACKED = {
    "norms": ("nf4", "adapter a = ln_tuning() { on **.input_layernorm }"),
    "head": ("nf4", "adapter a = lora(rank = 2) { on lm_head }"),
    "bias alone": ("int8", "adapter a = beft() { on **.v_proj }"),
    "bias where there was none": ("nf4", "adapter a = beft() { on **.v_proj }"),
}


@pytest.mark.parametrize("case", wide(NOTHING_PACKED, ["norms", "bias alone"]))
def test_what_changes_no_packed_weight_merges_without_a_word(case):
    kind, spec = NOTHING_PACKED[case]
    adapted = copy_with(kind, spec)
    before, wanted, count = stored(adapted), logits(adapted), len(packed_modules(adapted))
    drift = adapted.merge_drift()
    assert drift.largest < 1e-6
    adapted.merge_adapter()
    assert_close(logits(adapted), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))
    assert len(packed_modules(adapted)) == count
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), wanted)
    assert_same(stored(adapted), before)


def test_what_stands_in_front_is_refused_as_on_a_dense_base():
    base, _ = pair("nf4")
    adapted = compiler.apply(base, "adapter a = prompt(length = 2)")
    for how in (None, *HOW):
        with pytest.raises(UsageError, match="E522"):
            adapted.merge_adapter(quantized=how)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "spec",
    wide(
        ["lora(rank = 4, bias = true) { on **.v_proj }", "lora() { on **.v_proj  bias all }", "ia3() { on **.v_proj }"],
        ["lora(rank = 4, bias = true) { on **.v_proj }", "lora() { on **.v_proj  bias all }"],
    ),
)  # fmt: skip
def test_biases_beside_packed_weights_are_merged_and_given_back(spec, how):
    adapted = copy_with("int8", f"adapter c = {spec}")
    before, wanted = stored(adapted), logits(adapted)
    biases = [name for name in before if name.endswith("v_proj.bias")]
    plain = plain_kernels(adapted.merge_and_unload(quantized=how))
    adapted.merge_adapter(quantized=how)
    merged = logits(adapted)
    now = dict(adapted.named_parameters())
    for name in biases:
        assert not torch.equal(now[name], before[name])
    assert_close(merged, wanted, rtol=0, atol=0.03 * float(wanted.abs().max()))
    for each in (plain, plain_kernels(adapted.merge_and_unload())):
        with torch.no_grad():
            assert_close(logits(each), merged, rtol=0, atol=1e-5)
    assert_same(stored(adapted.unload()), before)
    adapted.unmerge_adapter()
    assert_same(stored(adapted), before)
    assert torch.equal(logits(adapted), wanted)


def test_a_bias_that_merging_brings_is_told():
    base, _ = pair("nf4")
    adapted = move(compiler.apply(base, "adapter a = lora(rank = 2, bias = true) { on **.q_proj }")).eval()
    with pytest.warns(UserWarning, match=r"gave model\.layers\.0\.self_attn\.q_proj a bias"):
        plain = adapted.merge_and_unload(quantized="requantize")
    assert plain.model.layers[0].self_attn.q_proj.bias is not None
    assert adapted.model.layers[0].self_attn.q_proj.bias is None


@pytest.mark.parametrize("how", HOW)
def test_ties_and_types_of_the_base_come_back(how):
    """A merged head of a bfloat16 base, held in float32 meanwhile, is untied, in bfloat16, whichever way it leaves."""
    base = quantize(dense("llama", tied=True), "nf4", torch.bfloat16)
    types = {name: each.dtype for name, each in base.named_parameters(remove_duplicate=False)}
    adapted = move(compiler.apply(base, "adapter a = lora(rank = 2) { on **.q_proj  train lm_head }")).eval()
    given = adapted.merge_and_unload(quantized=how)
    adapted.merge_adapter(quantized=how)
    for plain in (given, adapted.merge_and_unload()):
        found = {name: each.dtype for name, each in plain.named_parameters(remove_duplicate=False)}
        assert {found[name] for name in found if how == "dequantize" or types[name] == torch.bfloat16} == {
            torch.bfloat16
        }
        assert plain.lm_head.weight is not plain.model.embed_tokens.weight
        assert not torch.equal(plain.lm_head.weight, base.lm_head.weight)
        assert plain.config.tie_word_embeddings is False
    for plain in (adapted.unload(), base):
        assert plain.lm_head.weight is plain.model.embed_tokens.weight
        assert {name: each.dtype for name, each in plain.named_parameters(remove_duplicate=False)} == types
        assert plain.config.tie_word_embeddings is True
