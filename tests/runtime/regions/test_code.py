"""What a forward reads beside attributes of modules is seen when it changes: code of classes, fields of a user's own
objects, globals. The plain model, changed alike, is the oracle.
"""

import dataclasses
import sys
import types

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.models.llama import modeling_llama

from peftc import compiler
from peftc.compiler.api import Compiler
from peftc.passes.plan.plain import plain_class
from peftc.runtime.regions.code import watch_code
from tests import shared_traces, zoo
from tests.stack import Stack

X = torch.linspace(-1, 1, 8).reshape(2, 4)
SCALE = 1.0
SCALES = {"a": {"b": 1.0}}


def helper(x):
    return x


def outer(x):
    return helper(x)


@dataclasses.dataclass
class Fields:
    scale: float = 1.0


class Layer(nn.Module):
    scale = 1.0

    def __init__(self, way):
        super().__init__()
        self.linear, self.way = nn.Linear(4, 4), way
        self.fields = Fields()
        self.space = types.SimpleNamespace(inner=types.SimpleNamespace(scale=1.0))
        self.space.itself = self.space
        self.rows, self.table = [[1.0], [2.0]], {"a": {"b": 1.0}}
        self.function = helper

    def forward(self, x):
        return self.way(self, self.linear(x))

    def method(self, x):
        return x

    @property
    def computed(self):
        return self.scale

    @staticmethod
    def static(x):
        return x


def tripled(x, *_):
    return x * 3


def on_class(name, value):
    return lambda patch, layer: patch.setattr(plain_class(layer), name, value)


# What the forward does, and what is done to each layer later.
WAYS = {
    "a dataclass's field": (lambda m, x: x * m.fields.scale, lambda _, m: setattr(m.fields, "scale", 3.0)),
    "a namespace in a namespace": (
        lambda m, x: x * m.space.inner.scale,
        lambda _, m: setattr(m.space.inner, "scale", 3.0),
    ),
    "a list in a list": (lambda m, x: x * m.rows[0][0], lambda _, m: m.rows[0].__setitem__(0, 3.0)),
    "a dictionary in a dictionary": (
        lambda m, x: x * m.table["a"]["b"],
        lambda _, m: m.table["a"].__setitem__("b", 3.0),
    ),
    "a function": (lambda m, x: m.function(x), lambda _, m: setattr(m, "function", tripled)),
    "a method hidden by an attribute": (lambda m, x: m.method(x), lambda _, m: setattr(m, "method", tripled)),
    "a value of the class hidden by one": (lambda m, x: x * m.scale, lambda _, m: setattr(m, "scale", 3.0)),
    "a value of the class": (lambda m, x: x * m.scale, on_class("scale", 3.0)),
    "a property": (lambda m, x: x * m.computed, on_class("computed", property(lambda self: 3.0))),
    "what a property reads": (lambda m, x: x * m.computed, on_class("scale", 3.0)),
    "a method of the class": (lambda m, x: m.method(x), on_class("method", lambda self, x: x * 3)),
    "a static method": (lambda m, x: m.static(x), on_class("static", staticmethod(tripled))),
    "the forward of the class": (
        lambda m, x: x,
        on_class("forward", lambda self, x: self.linear(x) * 3),
    ),
}


class Global(Layer):
    """Ways that read globals have to be methods: the code that is looked at is the classes'."""

    def forward(self, x):
        return getattr(self, self.way)(self.linear(x))

    def constant(self, x):
        return x * SCALE

    def container(self, x):
        return x * SCALES["a"]["b"]

    def function_in_function(self, x):
        return outer(x)


GLOBALS = {
    "constant": lambda patch: patch.setattr(sys.modules[__name__], "SCALE", 3.0),
    "container": lambda patch: patch.setitem(SCALES["a"], "b", 3.0),
    "function_in_function": lambda patch: patch.setattr(sys.modules[__name__], "helper", tripled),
}


def pair(kind, way, regions):
    torch.manual_seed(0)
    model = Stack(kind(way) for _ in range(2)).eval()
    adapted = compiler.apply(model, "adapter a = lora(rank = 2) { on **.linear }", regions=regions).eval()
    assert_close(adapted(X), model(X))
    return model, adapted


@pytest.mark.parametrize("regions", ["layers", "modules", "model"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_changed_later_is_seen(way, regions, monkeypatch):
    runs, change = WAYS[way]

    class Own(Layer):
        pass

    model, adapted = pair(Own, runs, regions)
    before = model(X)
    layers = {id(each): each for both in (model, adapted) for each in both.layers}
    for layer in layers.values():
        change(monkeypatch, layer)
    assert not torch.allclose(model(X), before)
    assert_close(adapted(X), model(X))


@pytest.mark.parametrize("regions", ["layers", "model"])
@pytest.mark.parametrize("way", GLOBALS)
def test_globals_of_the_models_code_are_seen(way, regions, monkeypatch):
    model, adapted = pair(Global, way, regions)
    before = model(X)
    GLOBALS[way](monkeypatch)
    assert not torch.allclose(model(X), before)
    assert_close(adapted(X), model(X))


def test_a_function_of_transformers_that_is_replaced(monkeypatch):
    """As libraries of kernels do to models that are loaded already."""
    monkeypatch.setattr(Compiler, "trace_region", shared_traces._SHARED._trace_region)  # those of tests know no patches
    model = zoo.make("llama", num_hidden_layers=2)
    adapted = compiler.apply(model, "adapter a = lora(rank = 2) { on all linear }").eval()
    ids = torch.tensor([[3, 4, 5]])
    before = adapted(ids).logits
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *_, **__: (q * 2, k))
    assert not torch.allclose(model(ids).logits, before)
    assert_close(adapted(ids).logits, model(ids).logits)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    assert_close(adapted(ids).logits, model(ids).logits)


@pytest.mark.parametrize("regions", ["layers", "modules", "model"])
def test_the_class_of_an_adapted_layer_is_the_users_to_change(regions):
    """A region's class derives from the user's. What is set on it, as if it were that, is set on that."""

    class Own(Layer):
        pass

    model, adapted = pair(Own, lambda m, x: x, regions)
    kind = type(adapted.layers[0])
    kind.forward = lambda self, x: self.linear(x) * 3
    assert Own.forward is not Layer.forward
    assert_close(adapted(X), model(X))
    adapted.load_state_dict(
        {name: each + 1 for name, each in adapted.state_dict().items() if "bank" in name}, strict=False
    )
    assert not torch.allclose(adapted(X), model(X)), "it is adapted all the same"
    del kind.forward
    with adapted.disable_adapter():
        assert_close(adapted(X), model(X))


def test_nothing_is_made_anew_where_nothing_changed():
    _, adapted = pair(Layer, WAYS["a namespace in a namespace"][0], "layers")
    traces = adapted._adapter_state.host.traces
    kept = traces._kept
    before = {key: dict(value) for key, value in kept.items()}
    assert watch_code(adapted)()
    adapted(X)
    assert {key: dict(value) for key, value in traces._kept.items()} == before
