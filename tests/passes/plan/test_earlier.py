"""A model under its earlier names: as many sites, of the same sizes, and back to today's names."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peftc.passes.plan.earlier import Earlier, Slot, Today, as_it_was, earlier_names
from peftc.passes.plan.resolve import survey


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(3, 8, 4))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.gate, self.experts = nn.Linear(4, 4), Gate(), Experts()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.text = nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])})


def names(tensor):
    """`old.N` was what is `text.layers.N` now, and experts had an `a` and a `b` each."""
    if not tensor.startswith("old."):
        return Today(tensor)
    today = "text.layers." + tensor.removeprefix("old.")
    owner, _, rest = today.partition(".experts.")
    if rest.count(".") != 2:
        return Today(today)
    expert, part, _ = rest.split(".")
    slot = Slot(f"{owner}.experts.up", int(expert), "ab".index(part), 2)
    start = tensor.partition(".experts.")[0]
    return Today(slot.site, slot, lambda number, half: f"{start}.experts.{number}.{'ab'[half]}.weight")


@pytest.fixture
def ground():
    return survey(Model())


def test_what_is_called_as_today(ground):
    assert not earlier_names(ground, ["text.layers.0.q.weight", "text.nowhere.weight", "x"], names, ())


def test_one_name_tells_those_of_all_layers(ground):
    earlier = earlier_names(ground, ["old.0.q.weight"], names, ())
    assert earlier.modules["old.1.q"] == "text.layers.1.q"
    assert earlier.module("old.1.q.weight") == "text.layers.1.q.weight"
    assert earlier.before("text.layers.1.q") == "old.1.q"
    assert earlier.before("text.layers.1.q.bias") == "old.1.q.bias"
    was = as_it_was(ground, earlier)
    assert {site.module for site in was.sites} >= {"old.0.q", "old.1.q"}
    assert {"old", "old.0", "old.1.q"} <= set(was.universe.modules)
    assert was.tensors["old.0.q.bias"] == ground.tensors["text.layers.0.q.bias"]


def test_one_expert_tells_all_of_all_layers(ground):
    earlier = earlier_names(ground, ["old.1.experts.2.b.weight"], names, ())
    wanted = {f"old.{layer}.experts.{expert}.{part}" for layer in (0, 1) for expert in (0, 1, 2) for part in "ab"}
    assert set(earlier.slots) == wanted
    assert earlier.slots["old.0.experts.1.a"] == Slot("text.layers.0.experts.up", 1, 0, 2)
    assert earlier.site("old.0.experts.1.a") == "text.layers.0.experts.up"
    was = {site.name: site for site in as_it_was(ground, earlier).sites}
    assert set(was) == {site.name for site in ground.sites} - set(map(earlier.site, wanted)) | wanted
    assert {(was[each].kind, was[each].out_features, was[each].in_features) for each in wanted} == {("linear", 4, 4)}


@pytest.mark.parametrize("tensor", ["text.layers.0.gate.weight", "old.0.gate.weight"])
def test_a_linear_that_is_a_bare_weight_today(tensor, ground):
    earlier = earlier_names(ground, [tensor], names, ())
    other = tensor.replace("0", "1").removesuffix(".weight")
    assert earlier.weights[other] == "text.layers.1.gate.weight"
    site = next(each for each in as_it_was(ground, earlier).sites if each.name == other)
    assert (site.kind, site.out_features, site.in_features) == ("linear", 3, 4)


def test_one_that_is_chosen_as_what_it_is_today(ground):
    chosen = [f"text.layers.{layer}.gate.weight" for layer in (0, 1)]
    assert not earlier_names(ground, ["text.layers.0.gate.weight"], names, chosen)


def test_nothing_earlier_is_the_same_model(ground):
    was = as_it_was(ground, Earlier())
    assert was.sites == ground.sites
    assert was.universe == ground.universe
    assert SimpleNamespace(**was.tensors) == SimpleNamespace(**ground.tensors)
