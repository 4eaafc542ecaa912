"""Pieces: what weights and parameters alone decide is computed when one of them changed, and only then."""

import pytest
import torch
from torch import fx, nn
from torch.testing import assert_close

from peftc import compiler
from peftc.runtime.execution.program import HoistedConstants, hoisted

SPEC = """
adapter a = loha(rank = 2) { on all linear }
adapter b = loha(rank = 3) { on all linear }
activate a
"""
X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture
def counted(monkeypatch):
    """A model with adapters loaded for inference, and how often pieces were computed."""
    count = [0]
    original = HoistedConstants._put

    def put(self, values):
        count[0] += 1
        original(self, values)

    monkeypatch.setattr(HoistedConstants, "_put", put)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).eval()
    adapted = compiler.apply(model, SPEC, regions="model").eval()
    for each in adapted.adapter_bank.parameters():
        nn.init.normal_(each)
    adapted.set_adapter("a", inference_mode=True)

    def computed():
        found, count[0] = count[0], 0
        return found

    return adapted, computed


def expected(adapted, name="a"):
    """The outputs by a merged copy, which computes W' once and has no pieces."""
    x = X
    for at in ("0", "2"):
        linear, own = adapted.get_submodule(at), adapted.adapter_bank.get_submodule(f"{name}.{at}")
        scale = 8 / own.w1_a.shape[1]
        delta = scale * (own.w1_a @ own.w1_b) * (own.w2_a @ own.w2_b)
        x = nn.functional.linear(x, linear.weight + delta, linear.bias)
        x = torch.tanh(x) if at == "0" else x
    return x


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_frozen_calls_compute_once(context, counted):
    adapted, computed = counted
    for rows in (1, 3, 3, 200, 1):
        with context():
            adapted(X[:1].expand(rows, 4))
    assert computed() == 1
    assert_close(adapted(X), expected(adapted))
    assert computed() == 0


def _write(adapted):
    with torch.no_grad():
        adapted.adapter_bank.get_submodule("a.0").w1_a.mul_(2.0)


def _write_base(adapted):
    with torch.no_grad():
        adapted.get_submodule("0").weight.add_(1.0)


def _replace_base(adapted):
    adapted.get_submodule("2").weight = nn.Parameter(torch.randn(4, 6), requires_grad=False)


def _load(adapted):
    state = {name: torch.randn_like(each) for name, each in adapted.state_dict().items() if "adapter_bank" in name}
    adapted.load_state_dict(state, strict=False)


@pytest.mark.parametrize("change", [_write, _write_base, _replace_base, _load])
def test_a_change_computes_again(change, counted):
    adapted, computed = counted
    before = adapted(X)
    computed()
    change(adapted)
    after = adapted(X)
    assert computed() == 1
    assert not torch.allclose(before, after)
    assert_close(after, expected(adapted))
    adapted(X)
    assert computed() == 0


def test_a_bias_is_no_piece(counted):
    """It is read by the graph itself."""
    adapted, computed = counted
    adapted(X)
    computed()
    with torch.no_grad():
        adapted.get_submodule("2").bias.add_(1.0)
    assert_close(adapted(X), expected(adapted))
    assert computed() == 0


def test_switching_computes_again(counted):
    adapted, computed = counted
    results = {}
    for name in ("a", "b", "a"):
        adapted.set_adapter(name, inference_mode=True)
        results[name] = adapted(X)
        assert computed() == 1
        assert_close(results[name], expected(adapted, name))
    assert not torch.allclose(results["a"], results["b"])
    adapted.set_adapter("a", inference_mode=True)
    adapted(X)
    assert computed() == 0


def test_what_can_train_is_computed_in_every_call(counted):
    adapted, computed = counted
    adapted.set_adapter("a")
    own = adapted.adapter_bank.get_submodule("a.0").w1_a
    for _ in range(2):
        adapted(X).square().sum().backward()
        reference = torch.autograd.grad(expected(adapted).square().sum(), own)[0]
        assert_close(own.grad, reference)
        with torch.no_grad():
            own.sub_(0.1 * own.grad)
        own.grad = None
        assert_close(adapted(X), expected(adapted))
    assert computed() == 0  # in the graph itself


def test_freezing_and_training_again(counted):
    adapted, computed = counted
    adapted(X)
    adapted.set_adapter("a")
    adapted(X).sum().backward()
    assert adapted.adapter_bank.get_submodule("a.0").w1_a.grad is not None
    computed()
    adapted.set_adapter("a", inference_mode=True)
    assert_close(adapted(X), expected(adapted))
    assert computed() <= 1


def test_under_autocast_nothing_is_kept(counted):
    adapted, computed = counted
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapted(X)
    assert computed() == 0
    assert_close(adapted(X), expected(adapted))


def test_tensors_of_inference_mode_are_not_trusted():
    """They do not tell whether they were written to."""
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4)).eval()
        adapted = compiler.apply(model, "adapter a = loha(rank = 2) { on all linear }").eval()
        for each in adapted.adapter_bank.parameters():
            nn.init.normal_(each)
        adapted.set_adapter("a", inference_mode=True)
        before = adapted(X)
        for each in adapted.adapter_bank.parameters():
            each.mul_(1.5)
        assert not torch.allclose(adapted(X), before)


# --- alone ---


def prologue():
    graph = fx.Graph()
    doubled = graph.call_function(torch.mul, (graph.create_node("get_attr", "w.weight"), 2.0))
    graph.output((doubled,))
    return graph


def test_alone():
    module = nn.Linear(2, 2)
    module.weight.requires_grad_(False)
    pieces = hoisted(prologue(), lambda owner, leaf: ({"w": module}[owner]._parameters, leaf))
    assert pieces.values == {}
    pieces.refresh()
    first = pieces.values["p0"]
    assert torch.equal(first, 2 * module.weight)
    pieces.refresh()
    assert pieces.values["p0"] is first
    module.weight.mul_(3.0)
    pieces.refresh()
    assert torch.equal(pieces.values["p0"], 2 * module.weight)


def test_alone_with_a_gradient():
    """A piece made for a graph of gradients serves that call only."""
    module = nn.Linear(2, 2)
    pieces = hoisted(prologue(), lambda owner, leaf: ({"w": module}[owner]._parameters, leaf))
    pieces.refresh()
    first = pieces.values["p0"]
    assert first.requires_grad
    pieces.refresh()
    assert pieces.values["p0"] is not first
    with torch.no_grad():
        pieces.refresh()
    assert not pieces.values["p0"].requires_grad
    kept = pieces.values["p0"]
    with torch.no_grad():
        pieces.refresh()
    assert pieces.values["p0"] is kept
