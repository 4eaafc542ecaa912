"""Adapters on a small model that is stored in each of the known ways: as on the dense model of the same values."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.passes.quantized.schemes.known import packed, packed_modules
from tests.matrix import wide
from tests.passes.quantized.storages import STORES, Store

SPEC = """
adapter low = lora(rank = 4, bias = true) { on all linear }
adapter turned = dora(rank = 4) { on all linear }
adapter high = hira(rank = 4) { on all linear }
activate low
"""
EXACT = [name for name in STORES if name != "nf4 in bfloat16"]  # as the dense model computes
ALWAYS = ("torchao int8", "hqq 4")


class Net(nn.Module):
    """Two linears, one of them without a bias, and a norm that is never packed."""

    def __init__(self, store: Store | None = None):
        super().__init__()
        torch.manual_seed(0)
        up, down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.up, self.norm, self.down = (store(up) if store else up), nn.LayerNorm(96), (store(down) if store else down)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


def dense_of(model: nn.Module) -> Net:
    made = Net()
    made.norm = model.norm
    for name, held in packed_modules(model).items():
        dense = made.get_submodule(name)
        dense.weight = nn.Parameter(held.unpack(), requires_grad=False)
        if dense.bias is not None:
            dense.bias = nn.Parameter(held.module.bias.detach().clone(), requires_grad=False)
    return made


class Pair:
    """A model that is stored packed with adapters on it, and the dense one with the same."""

    def __init__(self, name: str):
        self.model = Net(STORES[name]).train()
        self.before = self.stored()
        self.adapted = compiler.apply(self.model, SPEC)
        self.dense = compiler.apply(dense_of(self.model), SPEC).train()
        self.x = torch.randn(2, 3, 64)
        mine, theirs = (dict(each.named_parameters()) for each in (self.adapted, self.dense))
        self.trained = [name for name in mine if name.startswith("adapter_bank.")]
        with torch.no_grad():
            for key in self.trained:
                mine[key].add_(torch.randn_like(mine[key]) * 0.1)
                theirs[key].copy_(mine[key])
        self.mine, self.theirs = mine, theirs

    def stored(self) -> list[torch.Tensor]:
        held = packed_modules(self.model).values()
        return [part.flatten().clone().view(torch.uint8) for each in held for part in each.parts]

    def outputs(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        for each in (self.adapted, self.dense):
            each.set_adapter(adapter)
        return self.adapted(self.x), self.dense(self.x)


@pytest.fixture(scope="module", params=wide(EXACT, ALWAYS))
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Pair(request.param)


@pytest.mark.parametrize("adapter", ["low", "turned", "high"])
def test_outputs_and_gradients_are_those_on_the_dense_model(pair, adapter):
    ours, theirs = pair.outputs(adapter)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pair.adapted.disable_adapter(), pytest.raises(AssertionError):
        assert_close(pair.adapted(pair.x), theirs, rtol=1e-2, atol=1e-2)
    for each in (ours, theirs):
        each.square().sum().backward()
    found = [key for key in pair.trained if pair.mine[key].grad is not None]
    assert len(found) >= 4
    for key in found:
        assert_close(pair.mine[key].grad, pair.theirs[key].grad, rtol=1e-3, atol=1e-4, msg=key)
        pair.mine[key].grad = pair.theirs[key].grad = None
    assert all(map(torch.equal, pair.stored(), pair.before))


def test_the_bias_is_seen(pair):
    sites = {at.site.name: at.site for at in pair.adapted.adapter_plan("low").sites}
    assert {name: each.has_bias for name, each in sites.items()} == {"up": True, "down": False}
    assert sites["up"].packing == packed(pair.model.up).packing


@pytest.mark.filterwarnings("ignore:merging gave")
def test_merging(pair):
    with torch.no_grad():
        unmerged, _ = pair.outputs("low")
        pair.dense.merge_adapter()
        merged = {name: pair.dense.get_submodule(name).weight for name in ("up", "down")}
        biases = {name: pair.dense.get_submodule(name).bias for name in ("up", "down")}
        pair.dense.unmerge_adapter()

        pair.adapted.merge_adapter(quantized="dequantize")
        assert_close(pair.adapted(pair.x), unmerged, rtol=1e-4, atol=1e-5)
        assert {type(pair.adapted.get_submodule(name)) for name in merged} == {nn.Linear}
        pair.adapted.unmerge_adapter()

        drift = {each.name: each for each in pair.adapted.merge_drift(quantized="requantize").tensors}
        pair.adapted.merge_adapter(quantized="requantize")
        plain = pair.adapted.merge_and_unload()
        assert_close(plain(pair.x), pair.adapted(pair.x), rtol=1e-5, atol=1e-5)
        for name, weight in merged.items():
            module, user = pair.adapted.get_submodule(name), pair.model.get_submodule(name)
            assert packed(module).packing == packed(user).packing
            again = packed(packed(user).scheme.pack(weight, user)).unpack()
            assert_close(packed(module).unpack(), again, rtol=1e-2, atol=1e-2)
            assert drift[f"{name}.weight"].largest == pytest.approx(float((again - weight).abs().max()), rel=0.1)
            assert_close(module.bias, biases[name])
        pair.adapted.unmerge_adapter()
        assert torch.equal(pair.adapted(pair.x), unmerged)
    assert all(map(torch.equal, pair.stored(), pair.before))


def test_unloading_and_loading(pair, tmp_path):
    with torch.no_grad():
        ours, _ = pair.outputs("turned")
        plain = pair.adapted.unload()
        assert_close(plain(pair.x), pair.model(pair.x))
        assert {type(each) for each in plain.children()} == {type(each) for each in pair.model.children()}
        assert not any(each.requires_grad for each in plain.parameters())
        pair.adapted.load_state_dict(pair.adapted.state_dict())
        pair.adapted.save_pretrained(tmp_path)
        loaded: Any = compiler.load(pair.model, tmp_path / "turned").train()
        assert_close(loaded(pair.x), ours)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the base is another
            assert_close(compiler.load(dense_of(pair.model), tmp_path / "turned")(pair.x), ours, rtol=1e-4, atol=1e-4)


def test_compiled(pair):
    """HQQ makes tensors that torch.compile refuses, and torchao puts tensors together that it would look into."""
    ours, _ = pair.outputs("low")
    torch.compiler.reset()
    compiled = torch.compile(pair.adapted, fullgraph=True, dynamic=True, backend="aot_eager")
    x = pair.x.clone().requires_grad_()
    y = pair.x.clone().requires_grad_()
    made = compiled(x)
    assert_close(made, ours)
    made.square().sum().backward()
    pair.adapted(y).square().sum().backward()
    assert_close(x.grad, y.grad)
