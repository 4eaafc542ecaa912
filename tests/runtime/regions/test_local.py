import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler

LORA = "adapter {name} = lora(rank = {rank}, alpha = 4) {{ on q, k }}"
SIZE = 64
X = torch.linspace(-1, 1, 2 * SIZE).reshape(2, SIZE)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x):
        return x + self.q(x).tanh() * self.k(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def drawn(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for each in model.adapter_bank.parameters():
            each.normal_(std=0.1)
    return model


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    made = drawn(compiler.apply(Net().eval(), LORA.format(name="a", rank=2)).eval())
    made.add_adapter(LORA.format(name="b", rank=3))
    return drawn(made)


def fresh(adapted, name):
    """The same adapter alone on a model of its own."""
    made = compiler.apply(adapted.unload(), LORA.format(name=name, rank={"a": 2, "b": 3}[name])).eval()
    own = {key: value for key, value in adapted.state_dict().items() if f"adapter_bank.{name}." in key}
    assert len(own) == 8
    made.load_state_dict(own, strict=False)
    return made


def locals_of(adapted):
    host = adapted._adapter_state.host
    return [host.local(path) for path in ("layers.0", "layers.1")]


def test_adapters_of_one_structure_share_what_was_made(adapted, monkeypatch):
    """The second costs neither a trace nor a graph nor code, whatever its rank; and it is the second that runs."""
    adapted.set_adapter("a")
    first = adapted(X)
    before = [local.bound for local in locals_of(adapted)]
    host = adapted._adapter_state.host
    monkeypatch.setattr(host, "_recipe", lambda *_: pytest.fail("something was made again"))
    adapted.set_adapter("b")
    second = adapted(X)
    for old, local in zip(before, locals_of(adapted), strict=True):
        (own,), (other,) = local.bound.values(), old.values()
        assert own is not other
        assert own.code.function is other.code.function
    assert_close(second, fresh(adapted, "b")(X), rtol=0, atol=0)
    assert not torch.allclose(first, second)
    adapted.set_adapter("a")
    assert torch.equal(adapted(X), first)


@pytest.mark.parametrize("inference_mode", [False, True])
def test_another_choice_of_lowerings_is_another_program(adapted, inference_mode):
    """Adapters that can train and those that cannot are not lowered alike."""
    adapted.set_adapter("a", inference_mode=not inference_mode)
    adapted(X)
    adapted.set_adapter("b", inference_mode=inference_mode)
    out = adapted(X)
    assert_close(out, fresh(adapted, "b")(X))
    assert out.requires_grad is not inference_mode


def test_what_is_shared_goes_with_what_it_was_made_of(adapted):
    """A part that is replaced, a hook, another mode: seen by an adapter that never met the module as it was."""
    adapted.set_adapter("a")
    adapted(X)
    adapted.layers[1].k = nn.Linear(SIZE, SIZE)
    adapted.set_adapter("b")
    wanted = {name: fresh(adapted, name)(X) for name in "ab"}
    assert_close(adapted(X), wanted["b"])
    seen = []
    handle = adapted.layers[0].q.register_forward_hook(lambda *given: seen.append(given))
    for count, name in enumerate("abab", 1):
        adapted.set_adapter(name)
        assert_close(adapted(X), wanted[name])
        assert len(seen) == count
    handle.remove()
    assert_close(adapted(X), wanted["b"])
    assert len(seen) == 4
    adapted.layers[0].train()  # nothing here trains otherwise
    assert_close(adapted(X), wanted["b"])


def test_a_copy_shares_nothing(adapted):
    adapted.set_adapter("a")
    wanted = adapted(X)
    copied = copy.deepcopy(adapted)
    with torch.no_grad():
        copied.layers[0].q.weight.add_(1)
    copied.set_adapter("b")
    assert_close(copied(X), fresh(copied, "b")(X))
    assert torch.equal(adapted(X), wanted)


def test_a_module_stored_packed_later(adapted):
    """It becomes a region when adapters are next prepared, and adapters that ran before know it."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    adapted.set_adapter("a")
    adapted(X)
    packed = bitsandbytes.nn.Linear4bit(SIZE, SIZE, quant_type="nf4", compute_dtype=torch.float32)
    packed.weight = bitsandbytes.nn.Params4bit(torch.randn(SIZE, SIZE), requires_grad=False, quant_type="nf4")
    adapted.layers[1].add_module("k", packed.to("cpu"))
    adapted.add_adapter("adapter c = ia3() { on layers.0.q }")
    adapted(X)
    adapted.set_adapter("b")
    assert_close(adapted(X), fresh(adapted, "b")(X))
