import gc
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler

SPEC = """
adapter a = lora(rank = 2, alpha = 4) { on all linear }
adapter b = lora(rank = 2, alpha = 2) { on all linear }
adapter c = lora(rank = 2, alpha = 2) { on "0" }
activate a
"""
X = torch.linspace(-1, 1, 8).reshape(2, 4)


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    made = compiler.apply(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval(), SPEC).eval()
    for parameter in made.adapter_bank.parameters():
        nn.init.normal_(parameter)
    return made


@pytest.fixture
def state(adapted):
    return adapted._adapter_state


def trained(state):
    return [name for name in state.names() if all(each.requires_grad for each in state.adapter(name).parameters())]


def test_names_keep_their_order(state):
    assert state.names() == ("a", "b", "c")
    assert list(state.plans()) == ["a", "b", "c"]
    assert state.adapter("b").plan.name == "b"


@pytest.mark.parametrize(("trainable", "expected"), [(True, ["b", "c"]), (False, []), (None, ["a"])])
def test_activation_and_gradients(trainable, expected, state):
    state.activate((("a", 1.0),), trainable=True)
    state.activate((("b", 1.0), ("c", 0.5)), trainable=trainable)
    assert state.active == (("b", 1.0), ("c", 0.5))
    assert trained(state) == expected


def test_weights_and_order_reach_the_output(adapted, state):
    def weight(index, *terms):
        module = adapted[index]
        total = module.weight
        for name, scale in terms:
            bank = state.adapter(name).get_submodule(str(index))
            total = total + scale * bank.B @ bank.A
        return total, module.bias

    state.activate((("b", 0.5), ("a", -1.0), ("c", 2.0)))
    (first, bias), (second, last) = weight(0, ("b", 0.5), ("a", -2.0), ("c", 2.0)), weight(2, ("b", 0.5), ("a", -2.0))
    expected = torch.tanh(X @ first.T + bias) @ second.T + last
    assert_close(adapted(X), expected)
    state.activate((("a", 1.0),))
    assert not torch.allclose(adapted(X), expected)


def test_removing_an_active_one_keeps_the_others(state):
    state.activate((("a", 1.0), ("b", 0.5)))
    state.remove("a")
    assert state.active == (("b", 0.5),)
    assert state.names() == ("b", "c")


def test_removing_one_that_rests_leaves_the_active_as_they_are(adapted, state):
    """A server removes adapters all day: nothing is prepared again, and nothing lives on of what is gone."""
    state.activate((("b", 1.0),))
    adapted(X)
    state.activate((("a", 1.0),))
    wanted, prepared = adapted(X), state._prepared[state.active]
    gone = [weakref.ref(each) for each in state.adapter("b").parameters()]
    state.remove("b")
    assert state._prepared[state.active] is prepared
    assert (("b", 1.0),) not in state._prepared
    assert torch.equal(adapted(X), wanted)
    gc.collect()
    assert not any(each() is not None for each in gone)


def test_a_name_used_again_is_another_adapter(adapted, state):
    state.activate((("a", 1.0),))
    before = adapted(X)
    state.remove("a")
    adapted.add_adapter("adapter a = lora(rank = 2) { on all linear }")
    adapted.set_adapter("a")
    adapted.disable_adapters()
    base = adapted(X)
    adapted.enable_adapters()
    assert_close(adapted(X), base)
    assert not torch.allclose(adapted(X), before)


def test_a_tensor_put_in_place_by_hand_is_seen_after_refresh(adapted, state):
    before = adapted(X)
    state.adapter("a").get_submodule("0").B = nn.Parameter(torch.randn(5, 2))
    state.refresh()
    assert not torch.allclose(adapted(X), before)


def test_activating_while_disabled_waits(adapted, state):
    hidden = torch.tanh(nn.functional.linear(X, adapted[0].weight, adapted[0].bias))
    base = nn.functional.linear(hidden, adapted[2].weight, adapted[2].bias)
    adapted.disable_adapters()
    adapted.set_adapter("b")
    assert_close(adapted(X), base)
    adapted.enable_adapters()
    with_b = adapted(X)
    assert not torch.allclose(with_b, base)
    adapted.set_adapter("a")
    adapted.set_adapter("b")
    assert_close(adapted(X), with_b)


def test_no_adapter_is_the_base(adapted, state):
    state.activate(())
    assert_close(adapted(X), adapted[2](torch.tanh(adapted[0](X))))


def test_switching_what_is_trained_makes_nothing_anew(adapted, state):
    """Gradients reach the one that comes: what was made for it is found, and not made for one that rests first."""
    first, second = state.names()[:2]
    seen = []
    for name in (first, second) * 2:
        adapted.set_adapter(name)
        seen.append(state.engine.active)
    assert seen[2] is seen[0]
    assert seen[3] is seen[1]
