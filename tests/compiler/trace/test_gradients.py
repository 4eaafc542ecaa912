"""What a forward says about gradients, and does in blocks and branches, holds: in regions and in a graph of the whole
model, whichever call came first.
"""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import ModelError
from tests.stack import Stack

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


class Written(torch.autograd.Function):
    """The backward is what comes of the operators anyway."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return gradient * gate * (1 + x * (1 - gate))


class Block(nn.Module):
    """Two linears, and between them what its kind says."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between = kind

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


def own_backward(block, x):
    return Tripled.apply(x)


def written_out(block, x):
    return Written.apply(x)


def no_grad(block, x):
    with torch.no_grad():
        gate = block.second(x).relu()
    return x * gate


@torch.no_grad()
def gate(block, x):
    with torch.enable_grad():
        pass
    return block.second(x)


def decorated(block, x):
    return x * gate(block, x)


def set_grad_enabled(block, x):
    with torch.set_grad_enabled(False):
        scale = torch.tanh(x)
    return x * scale


def statement(block, x):
    torch.set_grad_enabled(False)
    scale = torch.tanh(x)
    torch.set_grad_enabled(True)
    return x * scale


def nested(block, x):
    with torch.no_grad():
        scale = torch.tanh(x)
        with torch.enable_grad():
            x = x * 3
    return x * scale


def inference(block, x):
    with torch.inference_mode():
        scale = float(torch.ones(2).sum())
    return x * scale


def detached(block, x):
    return x * x.detach()


def asks(block, x):
    return x * 3 if torch.is_grad_enabled() else x


def asks_inside(block, x):
    with torch.no_grad():
        return_scale = 2 if torch.is_grad_enabled() else 5
    return x * return_scale


def asks_a_tensor(block, x):
    return x * 3 if x.requires_grad else x


def outside_of_autocast(block, x):
    with torch.autocast("cpu", enabled=False):
        return block.second(x)


def conditional(block, x):
    """The exporter keeps the branches as graphs of their own."""
    return torch.cond(x.sum() > 0, block.second, torch.tanh, (x,))


KINDS = [written_out, no_grad, decorated, set_grad_enabled, nested, detached, asks, asks_inside, outside_of_autocast]
SPLIT = [own_backward, statement, inference, asks_a_tensor]


def pair(kind, place, regions):
    """The model adapted by peft, and its checkpoint loaded."""
    torch.manual_seed(0)
    model = Stack(Block(kind) for _ in range(2)).eval()
    config = peft.LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(place)
    ours = compiler.load(model, place, is_trainable=True, regions=regions).eval()
    return theirs.double(), ours.double()


def gradients(model):
    output = model(X)
    output.pow(2).sum().backward()
    found = sorted((each.grad for each in model.parameters() if each.grad is not None), key=lambda each: each.norm())
    model.zero_grad()
    return output, [each.flatten() for each in found]


def check(theirs, ours, order):
    for keeps in order:
        if keeps:
            for one, other in zip(gradients(ours), gradients(theirs), strict=True):
                assert_close(one, other)
        else:
            with torch.no_grad():
                assert_close(ours(X), theirs(X))


@pytest.mark.parametrize("order", [(True, False, True), (False, True, False)], ids=["grad first", "no_grad first"])
@pytest.mark.parametrize("regions", ["layers", "modules", "model"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_holds(kind, regions, order, tmp_path):
    check(*pair(kind, tmp_path, regions), order)


def test_a_backward_that_is_written_out_splits_nothing(tmp_path):
    """As that of Bloom's activation."""
    _, ours = pair(written_out, tmp_path, "layers")
    gradients(ours)
    assert "split" not in str(ours.region_partition())


@pytest.mark.parametrize("order", [(True, False, True), (False, True, False)], ids=["grad first", "no_grad first"])
@pytest.mark.parametrize("kind", SPLIT)
def test_what_no_graph_has_runs_as_it_is_written(kind, order, tmp_path):
    theirs, ours = pair(kind, tmp_path, "layers")
    check(theirs, ours, order)


def test_statements_in_a_graph_of_the_whole_model(tmp_path):
    """Without gradients: the exporter puts what comes after each into a graph of its own, adapted weights and all."""
    check(*pair(statement, tmp_path, "model"), (False,))


@pytest.mark.parametrize("regions", ["layers", "model"])
def test_branches_are_adapted(regions, tmp_path):
    theirs, ours = pair(conditional, tmp_path, regions)
    for x in (X, -X):
        with torch.no_grad():
            assert_close(ours(x), theirs(x))


def test_a_graph_of_the_whole_model_refuses_gradients_where_a_function_has_a_backward_of_its_own(tmp_path):
    theirs, ours = pair(own_backward, tmp_path, "model")
    check(theirs, ours, (False,))
    with pytest.raises(ModelError, match=r'E466.*Tripled has a backward of its own(.|\n)*regions="layers"'):
        ours(X)
    check(theirs, ours, (False,))


def test_a_graph_of_the_whole_model_refuses_to_say_whether_a_tensor_requires_a_gradient(tmp_path):
    _, ours = pair(asks_a_tensor, tmp_path, "model")
    with pytest.raises(ModelError, match=r"E402.*asks whether a tensor requires a gradient"):
        ours(X)


def test_nothing_is_detached_that_no_gradient_goes_through(tmp_path):
    """Rotary embeddings of transformers are computed without gradients, of positions and buffers alone."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("table", torch.ones(4))

        @torch.no_grad()
        def angles(self, x):
            return torch.cos(torch.arange(x.shape[0])[:, None] * self.table)

        def forward(self, x):
            return self.linear(x) * self.angles(x)

    adapted = compiler.apply(Turned(), "adapter a = lora(rank = 2) { on linear }", regions="model").double()
    engine = adapted._adapter_state.engine
    graph = engine.traced(engine.call("", {"x": X})).graph
    assert not [node for node in graph.nodes if "detach" in str(node.target)]
    assert torch.equal(adapted(X), adapted.unload()(X))


@pytest.mark.parametrize("regions", ["layers", "model"])
def test_tracing_that_fails_leaves_torch_as_it_was(regions):
    before = (torch.no_grad.__enter__, torch.set_grad_enabled.__init__, vars(torch.autograd.Function)["apply"])

    class Breaks(Block):
        def forward(self, x):
            with torch.no_grad():
                raise KeyError("ours")

    adapted = compiler.apply(Breaks(asks), "adapter a = lora(rank = 2) { on first }", regions=regions).double()
    with pytest.raises((KeyError, ModelError)):
        adapted(X)
    assert before == (torch.no_grad.__enter__, torch.set_grad_enabled.__init__, vars(torch.autograd.Function)["apply"])
    assert torch.is_grad_enabled()
