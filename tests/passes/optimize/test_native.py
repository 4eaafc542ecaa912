import operator

import bitsandbytes as bnb
import pytest
import torch
from torch.testing import assert_close

from peftc.passes.ir import pass_manager
from peftc.passes.optimize.clean import Clean
from peftc.passes.optimize.native import NATIVE, NativeCalls
from peftc.passes.quantized.packed_operators import PACKED_LINEAR, UNPACK
from peftc.passes.quantized.schemes.known import packed

aten = torch.ops.aten


def f(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def positive(*shape):
    return f(*shape).abs() + 0.5


def mask():
    return torch.ones(2, 1, 3, 3).tril().log()


EIGHT = packed(bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu"))
assert EIGHT is not None
NUMBERS, PACKING = EIGHT.parts, EIGHT.packing.text

# Calls as they occur in traces: every form of arguments an operator is met with.
CALLS = [
    (aten.add.Tensor, (f(2, 3), f(2, 3)), {}),
    (aten.add.Tensor, (f(2, 3), 1), {}),
    (aten.add.Tensor, (f(2, 3), f(3)), {"alpha": 2}),
    (aten.addmm.default, (f(4), f(2, 3), f(3, 4)), {}),
    (aten.addmm_.default, (f(2, 4), f(2, 3), f(3, 4)), {"alpha": 0.5}),
    (aten.arange.default, (5,), {}),
    (aten.arange.default, (5,), {"device": torch.device("cpu"), "pin_memory": False}),
    (aten.arange.default, (4,), {"dtype": torch.float32, "device": torch.device("cpu")}),
    (aten.baddbmm.default, (f(2, 3, 5), f(2, 3, 4), f(2, 4, 5)), {}),
    (aten.baddbmm_.default, (f(2, 3, 5), f(2, 3, 4), f(2, 4, 5)), {}),
    (aten.bmm.default, (f(2, 3, 4), f(2, 4, 5)), {}),
    (aten.cat.default, ([f(2, 3), f(2, 3)],), {}),
    (aten.cat.default, ([f(2, 3), f(2, 5)], -1), {}),
    (aten.contiguous.default, (f(2, 3).t(),), {}),
    (aten.contiguous.default, (f(2, 3),), {"memory_format": torch.contiguous_format}),
    (aten.cos.default, (f(5),), {}),
    (aten.div.Tensor, (f(2, 3), positive(3)), {}),
    (aten.div.Tensor, (f(2, 3), 3.0), {}),
    (aten.dropout.default, (f(50), 0.5, True), {}),
    (aten.dropout.default, (f(50), 0.5, False), {}),
    (aten.embedding.default, (f(7, 4), torch.tensor([1, 0, 6])), {}),
    (aten.embedding.default, (f(7, 4), torch.tensor([1, 0, 6]), 0), {}),
    (aten.embedding.default, (f(7, 4), torch.tensor([1, 0, 6]), -1, False, False), {}),
    (aten.expand.default, (f(2, 1), [2, 5]), {}),
    (aten.expand.default, (f(2, 1), [-1, 5]), {"implicit": False}),
    (aten.gelu.default, (f(6),), {}),
    (aten.gelu.default, (f(6),), {"approximate": "tanh"}),
    (aten.layer_norm.default, (f(2, 4), [4], positive(4), f(4)), {}),
    (aten.layer_norm.default, (f(2, 4), [4], positive(4), f(4), 1e-6), {}),
    (aten.layer_norm.default, (f(2, 4), [4], None, None, 1e-6, False), {}),
    (aten.linear.default, (f(2, 3), f(4, 3)), {}),
    (aten.linear.default, (f(2, 3), f(4, 3), f(4)), {}),
    (aten.matmul.default, (f(2, 3, 4), f(4, 5)), {}),
    (aten.mean.dim, (f(2, 3), [-1], True), {}),
    (aten.mean.dim, (f(2, 3), [0]), {}),
    (aten.mean.dim, (f(2, 3), [0], False), {"dtype": torch.float64}),
    (aten.mm.default, (f(2, 3), f(3, 4)), {}),
    (aten.mul.Tensor, (f(2, 3), f(3)), {}),
    (aten.mul.Tensor, (f(2, 3), 0.5), {}),
    (aten.neg.default, (f(3),), {}),
    (aten.permute.default, (f(2, 3, 4), [2, 0, 1]), {}),
    (aten.pow.Tensor_Scalar, (f(3), 2), {}),
    (aten.pow.Tensor_Scalar, (positive(3), 0.5), {}),
    (aten.relu.default, (f(9),), {}),
    (aten.reshape.default, (f(2, 3, 4), [2, -1]), {}),
    (aten.rsqrt.default, (positive(3),), {}),
    (aten.scaled_dot_product_attention.default, (f(2, 4, 3, 8), f(2, 4, 3, 8), f(2, 4, 3, 8)), {}),
    (aten.scaled_dot_product_attention.default, (f(2, 4, 3, 8), f(2, 4, 3, 8), f(2, 4, 3, 8), mask()), {"scale": 0.3}),
    (aten.scaled_dot_product_attention.default, (f(2, 4, 3, 8),) * 3 + (None, 0.0, True), {}),
    (aten.scaled_dot_product_attention.default, (f(2, 4, 3, 8),) * 3 + (mask(), 0.5), {"scale": 0.3}),
    (
        aten.scaled_dot_product_attention.default,
        (f(2, 4, 3, 8), f(2, 2, 3, 8), f(2, 2, 3, 8), mask()),
        {"scale": 0.3, "enable_gqa": True},
    ),
    (aten.silu.default, (f(9),), {}),
    (aten.sin.default, (f(9),), {}),
    (aten.softmax.int, (f(2, 3), -1), {}),
    (aten.softmax.int, (f(2, 3), -1, torch.float64), {}),
    (aten.sub.Tensor, (f(2, 3), f(3)), {}),
    (aten.sub.Tensor, (f(2, 3), 1.0), {"alpha": 2}),
    (aten.sym_size.int, (f(2, 3), 1), {}),
    (aten.sym_size.int, (f(2, 3), -2), {}),
    (aten.t.default, (f(2, 3),), {}),
    (aten.tanh.default, (f(9),), {}),
    (aten.to.dtype, (f(9), torch.bfloat16), {}),
    (aten.to.dtype, (f(9), torch.float32, False, True), {}),
    (aten.transpose.int, (f(2, 3, 4), 1, 2), {}),
    (aten.unsqueeze.default, (f(2, 3), -1), {}),
    (aten.view.default, (f(2, 3, 4), [6, -1]), {}),
    (aten.__and__.Tensor, (torch.tensor([True, True, False]), torch.tensor([True, False, False])), {}),
    (aten.__and__.Tensor, (torch.tensor([6, 3]), torch.tensor([5, 1])), {}),
    (PACKED_LINEAR, (f(2, 3, 64), None, [*NUMBERS], PACKING, False), {}),
    (PACKED_LINEAR, (f(2, 64), f(32), [*NUMBERS], PACKING, True), {}),
    (UNPACK, ([*NUMBERS], PACKING), {}),
]


def fresh(value):
    return value.clone(memory_format=torch.preserve_format) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(("op", "args", "kwargs"), CALLS, ids=[str(op) for op, _, _ in CALLS])
def test_the_short_way_is_the_same(op, args, kwargs):
    results = []
    for call in (op, NATIVE[op]):
        torch.manual_seed(5)
        results.append(call(*[fresh(each) for each in args], **kwargs))
    long, short = results
    if not isinstance(long, torch.Tensor):
        assert long == short
        return
    assert_close(short, long, rtol=0, atol=0, equal_nan=True)
    assert short.stride() == long.stride()


def test_every_entry_is_tried():
    assert {op for op, _, _ in CALLS} == set(NATIVE)


def test_an_in_place_operator_stays_in_place():
    into = torch.zeros(2, 4)
    result = NATIVE[aten.addmm_.default](into, f(2, 3), f(3, 4))
    assert result is into
    assert into.abs().max() > 0


def test_a_copy_is_a_copy_and_a_view_a_view():
    x = f(2, 3)
    assert NATIVE[aten.to.dtype](x, torch.float32) is x
    assert NATIVE[aten.to.dtype](x, torch.float32, False, True).data_ptr() != x.data_ptr()
    assert NATIVE[aten.view.default](x, [6]).data_ptr() == x.data_ptr()


def test_golden(lab, golden):
    graph = lab.graph("Two")
    assert pass_manager.run(graph, [Clean(), NativeCalls()]).changes["native-calls"].made == 3
    golden("passes/optimize/native_calls.txt", "".join(f"{node.name} = {_name(node)}\n" for node in graph.nodes))


def _name(node):
    return f"{node.target.__module__}.{node.target.__qualname__}" if node.op == "call_function" else node.op


def test_numbers(lab):
    graph, x, tensors = lab.graph("Two"), torch.randn(3, 2, 4), lab.tensors("Two")
    before = lab.run(graph, tensors, x)
    pass_manager.run(graph, [Clean(), NativeCalls()])
    assert torch.equal(lab.run(graph, tensors, x), before)


def test_twice_is_once(lab):
    graph = lab.graph("Two")
    NativeCalls().run(graph)
    assert NativeCalls().run(graph).made == 0


def test_a_memory_format_by_place_goes_the_long_way(lab):
    hand = lab.hand()
    x = hand.placeholder("x", 1, 2, 3, 4)
    node = hand.call(aten.to.dtype, x, torch.float64, False, False, torch.channels_last)
    graph = hand.done(node)
    assert pass_manager.run(graph, [NativeCalls()]).changes["native-calls"].made == 0
    assert lab.run(graph, {}, f(1, 2, 3, 4)).is_contiguous(memory_format=torch.channels_last)


def test_what_is_gone_afterwards(lab):
    hand = lab.hand()
    x = hand.placeholder("x", 2)
    assert NativeCalls().removes(hand.call(aten.relu.default, x))
    assert not NativeCalls().removes(hand.call(aten.erf.default, x))
    assert not NativeCalls().removes(hand.graph.call_function(operator.add, (x, x)))
