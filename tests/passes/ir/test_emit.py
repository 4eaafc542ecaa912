import pytest
import torch

from peftc.passes.ir.emit import Emit, Origin, fake_like, mode_of

aten = torch.ops.aten
ORIGIN = Origin("some-pass", "model.q")


@pytest.fixture
def place(lab):
    hand = lab.hand()
    x = hand.placeholder("x", 2, 3)
    end = hand.call(aten.relu.default, x)
    end.meta["nn_module_stack"] = {"a": ("model", "M")}
    return hand, x, end, Emit(hand.graph, end, ORIGIN, like=end)


def test_a_call_knows_its_value_its_origin_and_its_module(place):
    hand, x, end, emit = place
    node = emit.call(aten.matmul.default, x, emit.call(aten.t.default, x))
    assert node.meta["val"].shape == (2, 2)
    assert node.meta["peftc"] == ORIGIN
    assert node.meta["nn_module_stack"] == end.meta["nn_module_stack"]
    assert [each.name for each in hand.graph.nodes].index(node.name) < [each.name for each in hand.graph.nodes].index(
        end.name
    )
    assert emit.made == [node.args[1], node]


def test_keyword_arguments(place):
    _, x, _, emit = place
    assert emit.call(aten.sum.dim_IntList, x, [0], dtype=torch.float64).meta["val"].dtype == torch.float64


def test_a_slot_says_whose_it_is(place):
    _, x, _, emit = place
    node = emit.slot("slots.p1__q.A", fake_like((4, 3), torch.bfloat16, x), 1, "A")
    assert (node.op, node.target) == ("get_attr", "slots.p1__q.A")
    assert node.meta["peftc"] == Origin("some-pass", "model.q", 1, "A")
    assert node.meta["val"].shape == (4, 3)
    assert node.meta["val"].dtype == torch.bfloat16


def test_a_constant_is_a_number(place):
    _, x, _, emit = place
    alpha = emit.constant("slots.p0__q.float__s", 1.0)
    assert alpha.meta["val"] == 1.0
    assert emit.call(aten.mul.Scalar, x, alpha).meta["val"].shape == (2, 3)


def test_a_wrong_call_fails_where_it_is_made(place):
    _, x, _, emit = place
    with pytest.raises(RuntimeError, match="same reduction dim"):
        emit.call(aten.mm.default, x, x)


def test_fake_like_is_in_the_graphs_mode(place):
    _, x, _, _ = place
    value = fake_like((), torch.float64, x)
    assert value.fake_mode is x.meta["val"].fake_mode
    assert mode_of(({"nested": [x]},)) is x.meta["val"].fake_mode
    assert fake_like((), torch.float64, x) is value
    assert fake_like((), torch.float32, x).dtype == torch.float32
    assert fake_like((1,), torch.float64, x).shape == (1,)


def test_an_operator_without_tensors_is_fake_as_what_is_near(place):
    _, x, _, emit = place
    made = emit.call(aten.eye.default, 3)
    assert mode_of((1, 2)) is None
    assert mode_of((made,)) is x.meta["val"].fake_mode
    assert emit.tensor(made).shape == (3, 3)
