import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.compiler.api import Compiler
from peftc.runtime.execution.call import read_call

SPEC = """
adapter a = lora(rank = 2, alpha = 4) { on all linear }
adapter b = lora(rank = 3, alpha = 2) { on all linear }
adapter c = lora(rank = 2) { on "0" }
activate a
"""


@pytest.fixture
def counted(monkeypatch):
    """An adapted model, and how often it traced and specialised."""
    counts = {"trace": 0, "specialise": 0}

    def counting(name):
        original = getattr(Compiler, name)

        def call(self, *args, **kwargs):
            counts[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Compiler, name, call)

    counting("trace")
    counting("specialise")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    adapted = compiler.apply(model, SPEC, regions="model").eval()
    for parameter in adapted.adapter_bank.parameters():
        nn.init.normal_(parameter)
    return adapted, counts


def made(counts):
    found = counts["trace"], counts["specialise"]
    counts.update(trace=0, specialise=0)
    return found


X = torch.linspace(-1, 1, 8).reshape(2, 4)


def test_applying_makes_nothing(counted):
    assert made(counted[1]) == (0, 0)


def test_a_call_makes_one_and_the_next_none(counted):
    adapted, counts = counted
    adapted(X)
    assert made(counts) == (1, 1)
    adapted(torch.randn(9, 4))
    assert made(counts) == (0, 0)


def test_switching_between_equal_structures_makes_nothing(counted):
    adapted, counts = counted
    first = adapted(X)
    made(counts)
    adapted.set_adapter("b")
    second = adapted(X)
    adapted.set_adapter({"a": 0.25})
    adapted(X)
    adapted.set_adapter("a")
    assert_close(adapted(X), first)
    assert not torch.allclose(first, second)
    assert made(counts) == (0, 0)


def test_a_new_structure_makes_one_program_and_no_trace(counted):
    adapted, counts = counted
    adapted(X)
    made(counts)
    for names in ("c", ["a", "b"], []):
        adapted.set_adapter(names)
        adapted(X)
        assert made(counts) == (0, 1), names
    for names in ("c", ["b", "a"], [], "a"):
        adapted.set_adapter(names)
        adapted(X)
    adapted.merge_adapter()
    adapted(X)
    assert made(counts) == (0, 0)


def test_an_added_adapter_of_a_known_structure_makes_nothing(counted):
    adapted, counts = counted
    adapted(X)
    made(counts)
    adapted.add_adapter("adapter d = lora(rank = 1) { on all linear }")
    adapted(X)
    assert made(counts) == (0, 0)


def test_training_is_another_signature(counted):
    adapted, counts = counted
    adapted(X)
    made(counts)
    adapted.train()
    adapted(X)
    assert made(counts) == (1, 1)
    adapted.eval()
    adapted(X)
    assert made(counts) == (0, 0)


def test_autocast_is_another_program_of_the_same_trace(counted):
    adapted, counts = counted
    plain = adapted(X)
    made(counts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapted(X).dtype == torch.bfloat16
        assert made(counts) == (0, 1)
    assert torch.equal(adapted(X), plain)
    assert made(counts) == (0, 0)


def test_moving_traces_anew(counted):
    adapted, counts = counted
    before = adapted(X)
    made(counts)
    adapted.double()
    assert_close(adapted(X.double()).float(), before)
    assert made(counts) == (1, 1)


def test_a_copy_shares_traces_and_not_programs(counted):
    adapted, counts = counted
    before = adapted(X)
    made(counts)
    other = copy.deepcopy(adapted)
    assert_close(other(X), before)
    assert made(counts) == (0, 1)
    with torch.no_grad():
        other[0].bias.add_(1.0)
    assert_close(adapted(X), before)
    assert not torch.allclose(other(X), before)


def test_graphs_for_diagrams(counted):
    adapted, _ = counted
    engine = adapted._adapter_state.engine
    call = read_call("", False, None, {"input": X})
    base, graph = engine.traced(call).graph, engine.graph(call)
    assert not any("peftc" in node.meta for node in base.nodes)
    assert any("peftc" in node.meta for node in graph.nodes)
    assert len(engine.traced(call).graph.nodes) == len(base.nodes)
