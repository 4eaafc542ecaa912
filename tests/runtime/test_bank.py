import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from peftc.grammar.elaborate import read_spec
from peftc.grammar.rule import Init
from peftc.passes.plan import ParamKey
from peftc.passes.resolve import resolve, survey
from peftc.runtime.bank import AdapterParameters, _fill, initial, prepared, trained_keys


def bank(plan, model, names, **options):
    made = plan(model, names, **options)
    return made, AdapterParameters(made, initial(made, model), trained_keys(made))


def linear(dtype=torch.float32):
    return nn.ModuleDict({"block": nn.ModuleDict({"q": nn.Linear(64, 48)}), "norm": nn.BatchNorm1d(4)}).to(dtype)


def filled(function, *shape, **arguments):
    torch.manual_seed(0)
    return _fill(torch.full(shape, math.nan), Init(function, tuple(arguments.items())))


def test_constants():
    assert torch.equal(filled("zeros", 2, 3), torch.zeros(2, 3))
    assert torch.equal(filled("ones", 2, 3), torch.ones(2, 3))
    assert torch.equal(filled("constant", 2, 3, value=0.25), torch.full((2, 3), 0.25))


@pytest.mark.parametrize("arguments", [{}, {"mean": 2.0, "std": 0.5}])
def test_normal(arguments):
    values = filled("normal", 200, 200, **arguments)
    assert values.mean().item() == pytest.approx(arguments.get("mean", 0.0), abs=0.02)
    assert values.std().item() == pytest.approx(arguments.get("std", 1.0), rel=0.02)


@pytest.mark.parametrize(
    ("function", "arguments", "low", "high"),
    [
        ("uniform", {"low": -1.0, "high": 3.0}, -1.0, 3.0),
        # bound = sqrt(6 / ((1 + a * a) * fan_in)) with fan_in the second axis
        ("kaiming_uniform", {"a": math.sqrt(5)}, -1 / math.sqrt(100), 1 / math.sqrt(100)),
        ("kaiming_uniform", {"a": 0.0}, -math.sqrt(6 / 100), math.sqrt(6 / 100)),
        ("xavier_uniform", {}, -math.sqrt(6 / 400), math.sqrt(6 / 400)),
    ],
)
def test_uniform(function, arguments, low, high):
    values = filled(function, 300, 100, **arguments)
    width = high - low
    assert values.min().item() == pytest.approx(low, abs=0.01 * width)
    assert values.max().item() == pytest.approx(high, abs=0.01 * width)
    assert low <= values.min()
    assert values.max() <= high
    assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.01 * width)
    assert values.std().item() == pytest.approx(width / math.sqrt(12), rel=0.02)


def test_an_unknown_initialiser_is_our_bug():
    with pytest.raises(AssertionError, match="orthogonal"):
        filled("orthogonal", 2, 2)


def test_lora_starts_as_nothing_and_by_its_seed(plan):
    model = linear()
    tensors = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made = plan(model, ["block.q"], rank=4)
        tensors.append(initial(made, model))
    a, b = (ParamKey("default", "block.q", role) for role in "AB")
    assert not tensors[0][b].any()
    assert tensors[0][a].any()
    assert torch.equal(tensors[0][a], tensors[1][a])
    assert not torch.equal(tensors[0][a], tensors[2][a])


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_types(base, adapter, plan):
    model = linear(base)
    made = plan(model, ["block.q"])
    sites = tuple(replace(at, site=replace(at.site, dtype=base)) for at in made.sites)
    assert {each.dtype for each in initial(replace(made, sites=sites), model).values()} == {adapter}


def test_copies_are_the_bases_values_and_their_own(plan):
    model = linear()
    nn.init.normal_(model.norm.weight)
    _, found = bank(plan, model, ["block.q"], train=["norm"])
    own = found.tensor(ParamKey("default", "norm", "weight"))
    assert torch.equal(own, model.norm.weight)
    assert own.data_ptr() != model.norm.weight.data_ptr()
    assert own.requires_grad


def test_buffers_are_not_trained():
    model = linear()
    made = resolve(read_spec("adapter a = lora() { train norm }").adapters[0], survey(model))
    found = AdapterParameters(made, initial(made, model), trained_keys(made))
    assert {name for name, _ in found.named_parameters()} == {"norm.weight", "norm.bias"}
    assert {name for name, _ in found.named_buffers()} == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    assert found.dtypes()["norm", "num_batches_tracked"] == torch.long


def test_names_and_keys(plan):
    made, found = bank(plan, linear(), ["block.q"], rank=4)
    assert {name: tuple(each.shape) for name, each in found.named_parameters()} == {
        "block.q.A": (4, 64),
        "block.q.B": (48, 4),
    }
    key = ParamKey("default", "block.q", "A")
    assert found.get_parameter(found.attribute(key)) is found.tensor(key)
    assert [key for key, _ in found.items()] == [ParamKey("default", "block.q", role) for role in "AB"]
    assert set(trained_keys(made)) == {key for key, _ in found.items()}


def test_tensors_are_live(plan):
    _, found = bank(plan, linear(), ["block.q"])
    key = ParamKey("default", "block.q", "A")
    found.double()
    assert found.tensor(key).dtype == torch.float64
    found.get_submodule("block.q").A = nn.Parameter(torch.ones(8, 64))
    assert torch.equal(found.tensor(key), torch.ones(8, 64))


def test_train_only(plan):
    _, found = bank(plan, linear(), ["block.q"])
    found.train_only(False)
    assert not any(each.requires_grad for each in found.parameters())
    found.train_only(True)
    assert all(each.requires_grad for each in found.parameters())


@pytest.mark.parametrize("upcast", [True, False])
def test_loaded_tensors(upcast, plan):
    model = linear()
    made = plan(model, ["block.q"], train=["norm"])
    loaded = {key: each.to(torch.bfloat16) for key, each in initial(made, model).items()}
    ready = prepared(made, loaded, upcast)
    assert ready[ParamKey("default", "block.q", "A")].dtype == (torch.float32 if upcast else torch.bfloat16)
    assert ready[ParamKey("default", "norm", "weight")].dtype == torch.bfloat16
    assert all(ready[key].data_ptr() != each.data_ptr() for key, each in loaded.items())
