import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.runtime.execution.call import read_call
from peftc.runtime.execution.program import Program

SPEC = "adapter a = lora(rank = 2, alpha = 4) { on all linear }"


class Net(nn.Module):
    """A buffer, a constant of the trace's own, and a linear."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("shift", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x):
        return self.linear(x) + self.shift * torch.tensor(2.0)


class Windows(nn.Module):
    """Cuts its input into pieces of three: a trace is bound to the length it saw."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return torch.stack([self.linear(each) for each in x.split(3, dim=1)])


def adapt(model, spec=SPEC):
    torch.manual_seed(0)
    adapted = compiler.apply(model, spec).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return adapted


def program(adapted, *args):
    call = read_call("", adapted.training, None, adapted._named(args, {}))
    return adapted._adapter_state.engine.program(call), call


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(1)
    model = Net().eval()
    return model, adapt(model)


def weight(adapted):
    a, b = (each for name, each in adapted.named_parameters() if name.endswith((".A", ".B")))
    return adapted.linear.weight + 2.0 * b @ a


def test_both_forms_compute_the_same(net):
    _, adapted = net
    found, call = program(adapted, torch.randn(5, 4))
    assert isinstance(found, Program)
    assert_close(found.module.forward(*call.tensors), found.function(*call.tensors))
    expected = call.tensors[0] @ weight(adapted).T + adapted.linear.bias + 2 * adapted.shift
    assert_close(found(call), expected)


def test_what_is_replaced_is_seen(net):
    """The graph reads the modules' own dictionaries: no program is made again."""
    _, kept = net
    adapted = copy.deepcopy(kept)
    x = torch.randn(5, 4)
    found, call = program(adapted, x)
    found(call)
    for change in (_new_parameter, _new_buffer, _new_adapter_tensor, _in_place):
        before = found(call)
        change(adapted)
        after = found(call)
        assert not torch.allclose(before, after), change.__name__
        assert_close(after, x @ weight(adapted).T + adapted.linear.bias + 2 * adapted.shift)
        assert_close(found.module.forward(*call.tensors)[0], after)
    assert program(adapted, x)[0] is found


def _new_parameter(adapted):
    adapted.linear.weight = nn.Parameter(torch.randn(3, 4))


def _new_buffer(adapted):
    adapted.shift = torch.randn(3)


def _new_adapter_tensor(adapted):
    with torch.no_grad():
        next(each for name, each in adapted.named_parameters() if name.endswith(".B")).copy_(torch.randn(3, 2))


def _in_place(adapted):
    adapted.linear.bias.data.add_(1.0)


def test_sizes_vary(net):
    model, adapted = net
    found, _ = program(adapted, torch.zeros(5, 4))
    for shape in ((1, 4), (7, 4)):
        assert program(adapted, torch.zeros(shape))[0] is found
    with adapted.disable_adapter():
        x = torch.randn(1, 4)
        assert_close(adapted(x), model(x))


def test_a_trace_bound_to_sizes_gets_another_for_others():
    model = Windows().eval()
    adapted = adapt(model)
    outputs = {}
    for length in (6, 9, 6, 9):
        x = torch.ones(2, length)
        outputs[length] = adapted(x)
        assert outputs[length].shape == (length // 3, 2, 2)
        with adapted.disable_adapter():
            assert_close(adapted(x), model(x))
    found, call = program(adapted, torch.ones(2, 6))
    assert found.fits(call)
    assert not found.fits(program(adapted, torch.ones(2, 9))[1])


class Branch(nn.Module):
    """Goes another way for more rows, which no size in the graph shows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x) if x.shape[0] > 3 else -self.linear(x)


@pytest.mark.parametrize("order", [(2, 5, 3, 1), (5, 2, 1, 9), (1, 4, 1)])
def test_a_branch_on_sizes_is_taken_anew(order):
    model = Branch().eval()
    adapted = adapt(model)
    with adapted.disable_adapter():
        for rows in order:
            x = torch.randn(rows, 3)
            assert_close(adapted(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types(dtype):
    model = Net().to(dtype).eval()
    adapted = adapt(model)
    x = torch.randn(5, 4, dtype=dtype)
    assert adapted(x).dtype == dtype
    assert not torch.equal(adapted(x), model(x))
    with adapted.disable_adapter():
        assert_close(adapted(x), model(x), rtol=0, atol=0)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {each.dtype for each in adapted.parameters() if each.requires_grad} == {expected}


def test_a_program_for_no_adapter():
    adapted = compiler.apply(Net().eval(), SPEC).eval()
    adapted.disable_adapters()
    found, call = program(adapted, torch.ones(1, 4))
    assert len(found.module.graph.find_nodes(op="get_attr")) == 4  # weight, bias, buffer, constant
    assert_close(found(call), adapted.linear(torch.ones(1, 4)) + 2 * adapted.shift)
