import pytest
import torch
from torch import nn

from peftc.runtime.adapters.bank import AdapterParameters, trained_keys
from peftc.runtime.adapters.slots import Slots, bind, scalars
from peftc.runtime.init.initial import initial


@pytest.fixture
def adapter(plan):
    model = nn.ModuleDict({"q": nn.Linear(4, 3), "norm": nn.LayerNorm(3)})
    made = plan(model, ["q"], rank=2, alpha=6, train=["norm"])
    return AdapterParameters(made, initial(made, model.state_dict(keep_vars=True).get), trained_keys(made))


def test_a_slot_is_made_once():
    slots = Slots()
    assert slots.module("slots.p0__q") is slots.module("slots.p0__q")
    assert slots.module("slots.p0__q") is not slots.module("slots.p1__q")


def test_what_a_slot_holds(adapter):
    slots = Slots()
    bind(slots.bindings([(adapter, 0.5)]))
    slot = slots.module("slots.p0__q")
    assert slot.A is dict(adapter.named_parameters())["q.A"]
    assert slot.B is dict(adapter.named_parameters())["q.B"]
    assert float(slot.s) == 1.5  # alpha / rank, times the activation weight
    assert slot.float__s == 1.5
    assert slots.module("copies.p0__norm").weight is dict(adapter.named_parameters())["norm.weight"]


def test_bindings_change_nothing_before_they_are_bound(adapter):
    slots = Slots()
    slots.bindings([(adapter, 1.0)])
    assert not dict(slots.module("slots.p0__q").named_parameters())
    assert not hasattr(slots.module("slots.p0__q"), "s")


def test_binding_again_replaces(adapter, plan):
    slots = Slots()
    bind(slots.bindings([(adapter, 1.0)]))
    model = nn.ModuleDict({"q": nn.Linear(4, 3)})
    made = plan(model, ["q"], rank=3, alpha=3, adapter="other")
    other = AdapterParameters(made, initial(made, model.state_dict(keep_vars=True).get), trained_keys(made))
    bind(slots.bindings([(other, 1.0)]))
    slot = slots.module("slots.p0__q")
    assert slot.A.shape == (3, 4)
    assert (float(slot.s), slot.float__s) == (1.0, 1.0)


def test_a_buffer_takes_a_parameters_place(adapter):
    """Only one of the two may answer to the name."""
    slots = Slots()
    slot = slots.module("copies.p0__norm")
    slot.register_buffer("weight", torch.zeros(3))
    bind(slots.bindings([(adapter, 1.0)]))
    assert "weight" not in slot._buffers
    assert isinstance(slot.weight, nn.Parameter)


def test_scalars(adapter):
    assert scalars(adapter, "q", 1.0) == {"s": 3.0}
    assert scalars(adapter, "q", -2.0) == {"s": -6.0}


def test_scalars_are_of_the_adapters_type(adapter):
    adapter.double()
    slots = Slots()
    bind(slots.bindings([(adapter, 1.0)]))
    assert slots.module("slots.p0__q").s.dtype == torch.float64
