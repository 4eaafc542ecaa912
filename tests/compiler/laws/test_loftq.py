"""Adapters that start from what quantization rounded away."""

import json

import bitsandbytes as bnb
import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from peftc.compiler import UsageError, apply, load

RANK = 4


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return Two()


@pytest.fixture(scope="module")
def packed(dense):
    made = Two()
    for name, linear in dense.named_children():
        four = bnb.nn.Linear4bit(linear.in_features, linear.out_features, quant_type="nf4", compute_dtype=torch.float32)
        four.load_state_dict(linear.state_dict())
        setattr(made, name, four.to("cpu"))
    return made


def started(packed, dense, **options):
    values = ", ".join(f"{name} = {value}" for name, value in {"rank": RANK, **options}.items())
    return apply(packed, f"adapter a = loftq({values}) {{ on up, down }}", dense=dense)


def factors(adapted, site):
    tensors = adapted.adapter_state_dict("a")
    (a,) = (value for key, value in tensors.items() if key.endswith(f"{site}.lora_A.weight"))
    (b,) = (value for key, value in tensors.items() if key.endswith(f"{site}.lora_B.weight"))
    return a.detach(), b.detach()


def stored(packed, site):
    weight = packed.get_submodule(site).weight
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


def test_the_start_is_pefts(packed, dense):
    adapted = started(packed, dense, alpha=RANK)  # PEFT's leaves the scale out
    for site in ("up", "down"):
        a, b = factors(adapted, site)
        error = dense.get_submodule(site).weight.detach() - stored(packed, site)
        wanted = _low_rank_decomposition(error, RANK)
        assert_close(b @ a, wanted["L"] @ wanted["R"], rtol=0, atol=1e-6)
        assert_close(b.T @ b, a @ a.T, rtol=0, atol=1e-6)
        assert (b @ a).norm() > 0.1 * error.norm()


@pytest.mark.parametrize("alpha", [1.0, 32.0])
def test_the_scale_counts(packed, dense, alpha):
    adapted = started(packed, dense, alpha=alpha)
    a, b = factors(adapted, "up")
    one, other = factors(started(packed, dense, alpha=RANK), "up")
    assert_close(b @ a * alpha / RANK, other @ one, rtol=0, atol=1e-6)


def test_it_is_closer_to_the_dense_model(packed, dense):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    adapted = started(packed, dense, rank=16, alpha=16)
    with torch.no_grad():
        wanted, before, after = dense(x), adapted.unload()(x), adapted(x)
    assert (after - wanted).norm() < 0.7 * (before - wanted).norm()


def test_from_a_directory(packed, dense, tmp_path):
    halves = [{"model.up.weight": dense.up.weight.detach()}, {"model.down.weight": dense.down.weight.detach()}]
    for index, tensors in enumerate(halves):
        save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / f"part{index}.safetensors")
    names = {name: f"part{index}.safetensors" for index, tensors in enumerate(halves) for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for one, other in zip(factors(started(packed, tmp_path), "up"), factors(started(packed, dense), "up"), strict=True):
        assert_close(one, other)


def test_a_weight_kept_the_other_way_round(packed, dense):
    turned = Two()
    for name, linear in dense.named_children():
        conv = Conv1D(linear.out_features, linear.in_features)
        conv.weight = nn.Parameter(linear.weight.detach().T.contiguous())
        setattr(turned, name, conv)
    for one, other in zip(factors(started(packed, turned), "up"), factors(started(packed, dense), "up"), strict=True):
        assert_close(one, other)


def test_the_file_is_one_of_lora(packed, dense, tmp_path):
    adapted = started(packed, dense)
    adapted.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    again = load(packed, tmp_path)
    assert again.adapter_plan("default").spec.rule.name == "lora"
    x = torch.randn(3, 64)
    assert torch.equal(again(x), adapted(x))


def test_refused(packed, dense, tmp_path):
    with pytest.raises(UsageError, match=r"E577.*nothing to compare with"):
        apply(packed, "adapter a = loftq { on up }")
    with pytest.raises(UsageError, match=r"E576.*up is not quantized"):
        apply(dense, "adapter a = loftq { on up }", dense=dense)
    with pytest.raises(UsageError, match=r"E578.*is not what was quantized here"):
        apply(packed, "adapter a = loftq { on up }", dense=Two())
    other = Two()
    other.up = nn.Linear(64, 32)
    with pytest.raises(UsageError, match=r"E578.*128 x 64, is 32 x 64 there"):
        apply(packed, "adapter a = loftq { on up }", dense=other)
    with pytest.raises(UsageError, match=r"E577.*no file"):
        apply(packed, "adapter a = loftq { on up }", dense=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UsageError, match=r"E577.*cannot be read"):
        apply(packed, "adapter a = loftq { on up }", dense=tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"up.weight": "../secret.safetensors"}}')
    with pytest.raises(UsageError, match=r"E577.*outside of its directory"):
        apply(packed, "adapter a = loftq { on up }", dense=tmp_path)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_pissa_starts_from_what_is_stored(packed, dense, kind):
    base = packed
    if kind == "int8":
        base = Two()
        for name, linear in dense.named_children():
            eight = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
            eight.load_state_dict(linear.state_dict())
            setattr(base, name, eight.to("cpu"))
    adapted = apply(base, f"adapter a = pissa(rank = {RANK}) {{ on up, down }}")
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert_close(adapted.train()(x), base.train()(x), rtol=0, atol=1e-5)
        a, b = factors(adapted, "up")
        weight = adapted.up.weight if kind == "int8" else None
        value = stored(packed, "up") if weight is None else weight.float() * (adapted.up.weight.SCB[:, None] / 127)
        s = 8 / RANK
        left, sizes, right = torch.linalg.svd(value)
        largest = left[:, :RANK] * sizes[:RANK] @ right[:RANK]
        assert_close(s * b @ a, largest, rtol=0, atol=1e-4)
        assert (adapted.unload().train()(x) - base.train()(x)).abs().max() == 0
