"""Giving a model a route and taking it away: the adapters that become active, the places that it tells apart."""

import pytest
import torch

from peftc import compiler
from peftc.grammar.diagnostics import AdapterError, UsageError
from tests import zoo

SPEC = """adapter one = lora(rank = 2) { on down_proj, q_proj }
adapter two = lora(rank = 3) { on embed_tokens, q_proj }
activate 0.5 * two"""


def test_a_route_activates_its_adapters_and_lets_others_be():
    model = compiler.apply(zoo.make("llama"), SPEC)
    model.set_route(lambda input_ids: torch.ones(2, 1), ["one"])
    assert model.active_adapters == ["two", "one"]
    assert dict(model._adapter_state.active) == {"two": 0.5, "one": 1.0}
    model.set_route(lambda input_ids: torch.ones(2, 2))
    assert model._adapter_state.routed.names == ("two", "one")
    model.set_route(None)
    assert (model.get_route(), model.get_route_places()) == (None, [])
    assert model.active_adapters == ["two", "one"]


def test_places_are_in_the_order_of_modules():
    model = compiler.apply(zoo.make("llama"), SPEC)
    model.set_route(lambda input_ids: torch.ones(2, 2), ["one", "two"])
    modules = [name for name, _ in zoo.make("llama").named_modules()]
    wanted = [name for name in modules if name.endswith(("down_proj", "q_proj", "embed_tokens"))]
    assert model.get_route_places() == wanted


ROUTED = SPEC.replace("activate 0.5 * two", "activate one + two\nroute = topic")
IDS = torch.arange(3, 9).view(1, 6)


def topic(input_ids):
    return torch.tensor([[0.25, 0.5]])


@torch.no_grad()
def test_a_route_that_a_spec_names():
    model = zoo.noisy(compiler.apply(zoo.make("llama"), ROUTED, routes={"topic": topic}).eval())
    assert model.get_route() is topic
    weighed = zoo.noisy(compiler.apply(zoo.make("llama"), SPEC).eval())
    weighed.set_adapter({"one": 0.25, "two": 0.5})
    torch.testing.assert_close(model(input_ids=IDS).logits, weighed(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "routes", "told"),
    [
        (ROUTED, None, "routes={'topic': function}"),
        (ROUTED, {"topics": topic}, "did you mean 'topic"),
        (ROUTED, {"topic": topic, "more": topic}, "no route 'more'"),
        (SPEC, {"topic": topic}, "the spec names none"),
    ],
)
def test_a_route_is_given_by_the_name_that_a_spec_has(spec, routes, told):
    with pytest.raises(AdapterError, match="E539") as error:
        compiler.apply(zoo.make("llama"), spec, routes=routes)
    assert told in str(error.value)


def test_what_is_added_has_no_route():
    model = compiler.apply(zoo.make("llama"), SPEC)
    with pytest.raises(UsageError, match="E518"):
        model.add_adapter("adapter three = lora { on q_proj }\nroute = topic")
    assert model._adapter_state.names() == ("one", "two")


def test_no_adapter_is_called_as_the_place_of_routes():
    model = compiler.apply(zoo.make("llama"), SPEC)
    with pytest.raises(UsageError, match="E575"):
        model.add_adapter("adapter _route = lora { on q_proj }")
    assert set(model.peft_config) == {"one", "two"}
