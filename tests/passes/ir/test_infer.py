import gc

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from peftc.passes.ir import infer as inference
from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.infer import agree, calls_of, described, infer, inferred_type, is_same_size, why_not
from peftc.passes.ir.values import wrong_value

aten = torch.ops.aten


@pytest.fixture
def mode():
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def fake(mode, *shape, dtype=torch.float32):
    with mode:
        return torch.empty(shape, dtype=dtype)


def symbolic(mode, *sizes):
    """A tensor whose sizes are symbols."""
    return mode.from_tensor(torch.empty(sizes), symbolic_context=None, source=None, static_shapes=False)


def test_equal_operators_on_equal_types_run_once(mode):
    one, two = fake(mode, 3, 4), fake(mode, 3, 4)
    first = infer(aten.mul.Tensor, (one, one), {}, mode)
    count = calls_of(mode)
    again = infer(aten.mul.Tensor, (two, one), {}, mode)
    assert calls_of(mode) == count
    assert agree(first, again)
    assert again is first  # fake values of one type need not be two
    del first, again
    assert agree(infer(aten.mul.Tensor, (two, one), {}, mode), one)
    assert calls_of(mode) == count


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        (aten.mul.Tensor, lambda x, y: (x, y)),
        (aten.mul.Scalar, lambda x, y: (x, 2)),
        (aten.mul.Scalar, lambda x, y: (x, 2.0)),
        (aten.sum.dim_IntList, lambda x, y: (x, [0])),
        (aten.sum.dim_IntList, lambda x, y: (x, [1])),
        (aten.mul.Tensor, lambda x, y: (x.t(), y.t())),
        (aten.mul.Tensor, lambda x, y: (x.double(), y)),
    ],
)
def test_another_constant_type_or_stride_is_another_call(operator, args, mode):
    x, y = fake(mode, 4, 4), fake(mode, 4, 4)
    infer(aten.sum.dim_IntList, (x, [0, 1]), {}, mode)
    with mode:
        given = args(x, y)
    count = calls_of(mode)
    infer(operator, given, {}, mode)
    assert calls_of(mode) == count + 1


def test_a_remembered_view_is_one_of_its_own_operand(mode):
    one, two = fake(mode, 3, 4), fake(mode, 3, 4)
    infer(aten.t.default, (one,), {}, mode)
    count, turned = calls_of(mode), infer(aten.t.default, (two,), {}, mode)
    assert calls_of(mode) == count
    assert (turned.shape, turned.stride()) == ((4, 3), (1, 4))
    assert turned.untyped_storage()._cdata == two.untyped_storage()._cdata


def test_a_view_of_each_operand_is_made_once_while_somebody_has_it(mode):
    """Views of two operands, asked for in turns, as those of two kinds of linears are."""
    operands = [fake(mode, 3, 4), fake(mode, 3, 4)]
    views = [infer(aten.t.default, (each,), {}, mode) for each in operands]
    assert all(infer(aten.t.default, (each,), {}, mode) is view for each, view in zip(operands, views, strict=True))
    del views
    gc.collect()
    assert infer(aten.t.default, (operands[0],), {}, mode).shape == (4, 3)


def test_an_operator_that_changes_its_operands_shape_leaves_the_value_as_it_is(mode):
    x = fake(mode, 3, 4)
    for _ in range(2):
        assert infer(aten.unsqueeze_.default, (x, 0), {}, mode).shape == (1, 3, 4)
        assert x.shape == (3, 4)


def test_a_size_that_only_data_says_is_another_each_time(mode):
    one, two = (infer(aten.nonzero.default, (fake(mode, 3, 4),), {}, mode) for _ in range(2))
    assert calls_of(mode) == 2
    assert one.shape[0].node.expr != two.shape[0].node.expr


def test_several_results_are_remembered(mode):
    one, two = fake(mode, 6, 4), fake(mode, 6, 4)
    infer(aten.split.Tensor, (one, 2), {}, mode)
    count, parts = calls_of(mode), infer(aten.split.Tensor, (two, 2), {}, mode)
    assert calls_of(mode) == count
    assert [tuple(each.shape) for each in parts] == [(2, 4)] * 3
    assert {each.untyped_storage()._cdata for each in parts} == {two.untyped_storage()._cdata}


def test_a_memo_ends_with_its_mode(mode):
    x = fake(mode, 2)
    infer(aten.neg.default, (x,), {}, mode)
    assert mode in inference._MEMOS
    other = FakeTensorMode(allow_non_fake_inputs=True)
    assert calls_of(other) == 0


def test_an_operator_that_fails_is_not_remembered(mode):
    x = fake(mode, 2, 3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="same reduction dim"):
            infer(aten.mm.default, (x, x), {}, mode)


def test_sizes_are_compared_as_expressions(mode):
    x = symbolic(mode, 5, 7)
    rows, columns = x.shape
    assert is_same_size(rows + columns, columns + rows)
    assert is_same_size(2 * rows - rows, rows)
    assert not is_same_size(rows, columns)
    assert not is_same_size(rows, 5), "that it has this size in the example is not known of all"
    assert is_same_size(3, 3)
    assert not is_same_size(3, 4)


def test_values_that_agree(mode):
    x, y = fake(mode, 2, 3), fake(mode, 2, 3)
    assert agree(x, y)
    assert agree((x, [y]), [x, y])
    assert not agree(x, fake(mode, 3, 2))
    assert not agree(x, fake(mode, 2, 3, dtype=torch.int64))
    assert not agree(x, 3)
    assert not agree((x, y), (x,))
    assert agree(None, None)
    assert described(x) == "float32[2, 3] on cpu"
    assert described((x, 3)) == "(float32[2, 3] on cpu, 3)"


def test_a_type_is_told_without_a_tensor(mode):
    x = fake(mode, 2, 3)
    made = infer(aten.t.default, (x,), {}, mode)
    told = inferred_type(aten.t.default, (x,), {}, mode)
    assert not isinstance(told, torch.Tensor)
    assert agree(made, told)
    assert described(told) == "float32[3, 2] on cpu"


class Branches(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))


class Counts(nn.Module):
    def forward(self, x):
        return torch.nonzero(x).float() * 2


def test_what_cannot_be_inferred_says_why(lab):
    """Each of these reasons, of a real graph or of one by hand; and all that can be is."""
    hand = lab.hand()
    x = hand.placeholder("x", 3, 1)
    turned = hand.call(aten.squeeze_.dim, hand.call(aten.clone.default, x), 1)
    check = hand.call(aten._assert_tensor_metadata.default, x, dtype=torch.float32)
    assert why_not(x) == "it is a placeholder"
    assert why_not(turned) == "it changes the shape of its operand in place"
    assert why_not(check) == "it gives nothing: an assertion, or a call for its effect"
    assert why_not(hand.call(aten.neg.default, x)) is None


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Branches(), "its operands are graphs of their own"), (Counts(), "it has a size that only data says")],
)
def test_what_a_trace_has_that_cannot_be_inferred(model, reason, lab):
    graph: fx.Graph = lab.trace(model, torch.ones(3, 4))
    reasons = [why_not(node) for node in graph.nodes if node.op == "call_function"]
    assert reasons.count(reason) == 1
    assert None in reasons, "what reads it is inferred"
    assert [wrong_value(node, full=True) for node in graph.nodes if node.op != "output"].count(None) == len(
        graph.nodes
    ) - 1


def test_emitting_the_same_twice_calls_once(lab):
    hand = lab.hand()
    x, y = hand.placeholder("x", 2, 3), hand.placeholder("y", 2, 3)
    end = hand.call(aten.relu.default, x)
    emit = Emit(hand.done(end), end, Origin("test"), like=end)
    first = emit.call(aten.matmul.default, x, emit.call(aten.t.default, x))
    count = calls_of(hand.mode)
    second = emit.call(aten.matmul.default, y, emit.call(aten.t.default, y))
    assert calls_of(hand.mode) == count
    assert agree(first.meta["val"], second.meta["val"])
