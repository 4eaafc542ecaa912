from dataclasses import replace

import pytest
import torch
from torch import nn

from peftc.grammar.spec.elaborate import read_spec
from peftc.passes.plan.plan import ParamKey
from peftc.passes.plan.resolve import resolve, survey
from peftc.runtime.adapters.bank import AdapterParameters, trained_keys
from peftc.runtime.init.initial import initial


def fresh(plan, model, given=None, **options):
    return initial(plan, model.state_dict(keep_vars=True).get, given, **options)


def bank(plan, model, names, **options):
    made = plan(model, names, **options)
    return made, AdapterParameters(made, fresh(made, model), trained_keys(made))


def linear(dtype=torch.float32):
    return nn.ModuleDict({"block": nn.ModuleDict({"q": nn.Linear(64, 48)}), "norm": nn.BatchNorm1d(4)}).to(dtype)


def test_lora_starts_as_nothing_and_by_its_seed(plan):
    model = linear()
    tensors = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made = plan(model, ["block.q"], rank=4)
        tensors.append(fresh(made, model))
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
    assert {each.dtype for each in fresh(replace(made, sites=sites), model).values()} == {adapter}


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
    found = AdapterParameters(made, fresh(made, model), trained_keys(made))
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
        "block__q.A": (4, 64),
        "block__q.B": (48, 4),
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
    found.get_submodule("block__q").A = nn.Parameter(torch.ones(8, 64))
    assert torch.equal(found.tensor(key), torch.ones(8, 64))


def test_train_only(plan):
    _, found = bank(plan, linear(), ["block.q"])
    found.train_only(False)
    assert not any(each.requires_grad for each in found.parameters())
    found.train_only(True)
    assert all(each.requires_grad for each in found.parameters())


@pytest.mark.parametrize(("upcast", "kind"), [(True, torch.bfloat16), (False, torch.bfloat16), (False, torch.float32)])
def test_loaded_tensors(upcast, kind, plan):
    model = linear().to(kind)
    made = plan(model, ["block.q"], train=["norm"])
    loaded = {key: each.to(torch.bfloat16) for key, each in fresh(made, model).items()}
    ready = fresh(made, model, loaded, upcast=upcast)
    assert ready[ParamKey("default", "block.q", "A")].dtype == (torch.float32 if upcast else kind)
    # A trained copy stands for a tensor of the base, and has its type, as where PEFT copies it into the module.
    assert ready[ParamKey("default", "norm", "weight")].dtype == kind
    assert all(ready[key].data_ptr() != each.data_ptr() for key, each in loaded.items())
