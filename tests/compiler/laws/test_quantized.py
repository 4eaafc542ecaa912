"""Adapters of a quantized base: saved and loaded on this and other bases, exchanged with peft, switched."""

import copy
import warnings

import peft
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from peftc import compiler
from peftc.passes.quantized.schemes.known import packed_modules
from peftc.runtime.peft_format.manifest import read_manifest
from tests.matrix import wide
from tests.quantized_models import IDS, dense, logits, move, pair, plain_kernels, quantize

KINDS = wide(["nf4", "int8"], ["nf4"])
SPEC = "adapter a = lora(rank = 4) { on **.q_proj, **.v_proj }"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_on_the_same_quantized_base(kind, tmp_path):
    base, adapted = pair(kind)
    adapted.save_pretrained(tmp_path, selected_adapters=["a"])
    manifest = read_manifest(tmp_path / "a")
    assert manifest is not None
    assert manifest.quantized == kind
    base.save_pretrained(tmp_path / "base")
    from_disk = plain_kernels(AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"}))
    for again in (base, quantize(dense("opt" if kind == "int8" else "llama"), kind), from_disk):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the adapter|the weights")
            loaded = compiler.load(again, tmp_path / "a").eval()
    assert torch.equal(logits(loaded), logits(adapted))


def test_a_base_that_bitsandbytes_repacked_is_still_the_same_base(tmp_path):
    base = quantize(dense("llama"), "nf4", repacks=True)
    move(compiler.apply(base, SPEC)).save_pretrained(tmp_path)
    with torch.no_grad():
        logits(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the adapter|the weights")
        compiler.load(base, tmp_path)


def test_a_base_that_is_stored_in_another_way_is_told(tmp_path, golden):
    base = quantize(dense("llama"), "exact")
    adapted = move(compiler.apply(base, SPEC)).eval()
    adapted.save_pretrained(tmp_path / "quantized")
    move(compiler.apply(dense("llama"), SPEC)).save_pretrained(tmp_path / "dense")
    unpacked = copy.deepcopy(base).dequantize(torch.float32)
    said = []
    loaded = {}
    for name, model, path in (
        ("original", dense("llama"), "quantized"),
        ("unpacked", unpacked, "quantized"),
        ("other", quantize(dense("llama"), "int8"), "quantized"),
        ("packed", base, "dense"),
    ):
        with pytest.warns(UserWarning, match="the adapter was trained on") as caught:
            loaded[name] = compiler.load(model, tmp_path / path).eval()
        said += [f"{name}: {each.message}" for each in caught if str(each.message).startswith("the adapter")]
    golden("quantized/bases.txt", "\n".join(said) + "\n")
    assert torch.equal(logits(loaded["unpacked"]), logits(adapted))


def test_other_weights_that_are_quantized_alike_are_told(tmp_path):
    base, _ = pair("nf4")
    move(compiler.apply(base, SPEC)).save_pretrained(tmp_path)
    other = type(dense("llama"))(dense("llama").config)
    with pytest.warns(UserWarning, match="are not those the adapter was trained on"):
        compiler.load(quantize(other, "nf4"), tmp_path)


@pytest.mark.parametrize("kind", wide(["nf4", "int8", "exact"], ["exact"]))
def test_peft_and_we_read_each_other(kind, tmp_path):
    model = dense("opt" if kind == "int8" else "llama")
    base = quantize(model, kind)
    atol = 0.0 if kind == "exact" else 0.01
    ours = move(compiler.apply(base, SPEC)).eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs = plain_kernels(peft.PeftModel.from_pretrained(quantize(model, kind), str(tmp_path / "ours")))
    with torch.no_grad():
        assert_close(logits(ours), logits(theirs), rtol=0, atol=atol)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(2)
    theirs = plain_kernels(peft.get_peft_model(quantize(model, kind), config))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours.load_adapter(tmp_path / "theirs", "theirs")
    ours.set_adapter("theirs")
    with torch.no_grad():
        assert_close(logits(ours), logits(theirs), rtol=0, atol=atol)
    assert theirs.get_nb_trainable_parameters()[1] == compiler.apply(base, SPEC).get_nb_trainable_parameters()[1]


@pytest.mark.parametrize("kind", KINDS)
def test_switching_neither_traces_nor_makes_a_graph(kind, tmp_path, monkeypatch):
    _, adapted = pair(kind)
    first, made = logits(adapted), []
    backend = type(adapted._adapter_state.engine.backend)
    for name in ("trace", "specialise"):
        known = getattr(backend, name)
        monkeypatch.setattr(backend, name, lambda *a, _k=known, _n=name, **k: (made.append(_n), _k(*a, **k))[1])
    adapted.set_adapter("b")
    second = logits(adapted)
    adapted.save_pretrained(tmp_path, selected_adapters=["b"])
    adapted.load_adapter(tmp_path / "b", "later")
    adapted.set_adapter("later")
    assert torch.equal(logits(adapted), second)
    adapted.set_adapter("a")
    adapted.delete_adapter("later")
    assert torch.equal(logits(adapted), first)
    assert not torch.equal(first, second)
    assert made == []
    adapted.set_adapter({"a": 0.5, "b": 2.0})
    both = logits(adapted)
    with adapted.disable_adapter():
        bare = logits(adapted)
    assert torch.equal(logits(adapted), both)
    adapted.set_adapter("a")
    assert "trace" not in made
    plain = plain_kernels(adapted.unload())
    with torch.no_grad():
        assert_close(bare, logits(plain), rtol=0, atol=1e-5)
        for at in adapted.adapter_plan("a").sites:
            deltas = [_delta(adapted, name, at.site.module) for name in "ab"]
            _densify(plain, at.site.module, 0.5 * deltas[0] + 2.0 * deltas[1])
        assert_close(both, logits(plain), rtol=0, atol=0.03 * float(both.abs().max()))


def _delta(adapted, name, site):
    saved = adapted.adapter_state_dict(name)
    down, up = (saved[f"base_model.model.{site}.lora_{each}.weight"] for each in "AB")
    return 2.0 * up @ down


def _densify(model, site, change):
    held = packed_modules(model)[site]
    linear = torch.nn.Linear(held.packing.in_features, held.packing.out_features, held.module.bias is not None)
    linear.weight.data = held.unpack() + change
    if held.module.bias is not None:
        linear.bias.data = held.module.bias.data
    model.set_submodule(site, linear)
    assert logits(model).shape[:2] == IDS.shape
