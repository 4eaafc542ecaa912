import pytest
import torch
from torch.testing import assert_close

from peftc.compiler.pipeline.lower import copy_graph
from peftc.passes.insert.insert_delta import InsertDelta
from peftc.passes.ir import pass_manager
from peftc.passes.ir.emit import Origin
from peftc.passes.ir.pass_manager import Miss
from peftc.passes.optimize.clean import Clean
from peftc.passes.optimize.fuse_low_rank import FuseLowRank

aten = torch.ops.aten
ONE = "adapter a = lora(rank = 2, alpha = 6) { on all linear }"
TWO = "adapter b = lora(rank = 3, alpha = 1.5) { on first }"


def adapted(lab, *specs):
    active = lab.active("Two", *specs)
    graph = lab.graph("Two")
    pass_manager.run(graph, [Clean(), InsertDelta(active.structure, active.slot_value, False)])
    return graph, active


def fused(lab, *specs):
    graph, active = adapted(lab, *specs)
    change = pass_manager.run(graph, [FuseLowRank()]).changes["fuse-low-rank"]
    return graph, active, change


def sum_of(graph):
    (total,) = graph.find_nodes(op="call_function", target=aten.add.Tensor)
    return total


def test_golden(lab, golden):
    graph, *_ = fused(lab, TWO)
    golden("passes/optimize/fuse_low_rank.txt", lab.show(graph))


@pytest.mark.parametrize("specs", [(ONE,), (ONE, TWO), (TWO, ONE)], ids=["one", "two", "two the other way"])
def test_numbers(specs, lab):
    x = torch.randn(3, 2, 4)
    before, active = adapted(lab, *specs)
    after, active, change = fused(lab, *specs)
    assert change.made
    assert not after.find_nodes(op="call_function", target=aten.add.Tensor)
    tensors = lab.tensors("Two") | active.tensors
    assert_close(lab.run(after, tensors, x), lab.run(before, tensors, x))
    with pytest.raises(AssertionError):
        assert_close(lab.run(after, tensors, x), lab.model("Two")(x))


def test_gradients(lab):
    before, active = adapted(lab, ONE, TWO)
    after, *_ = fused(lab, ONE, TWO)
    grads = []
    for graph in (before, after):
        leaves = {
            name: each.detach().double().requires_grad_() if isinstance(each, torch.Tensor) else each
            for name, each in (lab.tensors("Two") | active.tensors).items()
        }
        x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        lab.run(graph, leaves, x).square().sum().backward()
        trained = {name: leaves[name].grad for name in active.tensors if name.endswith((".A", ".B"))}
        grads.append({**trained, "x": x.grad, "w": leaves["first.weight"].grad})
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert grad.abs().max() > 0, name
        assert_close(grads[1][name], grad, msg=name)


def test_twice_is_once(lab):
    graph, *_ = fused(lab, ONE, TWO)
    once = lab.show(graph)
    assert FuseLowRank().run(graph).made == 0
    assert lab.show(graph) == once


def test_two_dimensions_need_no_reshaping(lab):
    hand, graph = lab.hand(), None
    x, weight = hand.placeholder("x", 5, 4), hand.attribute("w", 3, 4)
    a, b, s = hand.attribute("slot.A", 2, 4), hand.attribute("slot.B", 3, 2), hand.attribute("slot.s")
    base = hand.call(aten.linear.default, x, weight)
    scaled = hand.call(aten.mul.Tensor, hand.call(aten.linear.default, x, a), s)
    total = hand.call(aten.add.Tensor, base, hand.call(aten.linear.default, scaled, b))
    total.meta["peftc"] = Origin("insert-delta", "site")
    graph = hand.done(total)
    tensors = {"w": torch.randn(3, 4), "slot.A": torch.randn(2, 4), "slot.B": torch.randn(3, 2)}
    tensors |= {"slot.s": torch.tensor(0.5), "slot.float__s": 0.5}
    given = torch.randn(5, 4)
    expected = lab.run(copy_graph(graph), tensors, given)
    pass_manager.run(graph, [FuseLowRank()])
    called = {node.target for node in graph.find_nodes(op="call_function", target=aten.reshape.default)}
    called |= {node.target for node in graph.find_nodes(op="call_function", target=aten.view.default)}
    assert not called
    assert_close(lab.run(graph, tensors, given), expected)


def _base_read_twice(graph):
    base = sum_of(graph).args[0]
    with graph.inserting_after(base):
        other = graph.call_function(aten.relu.default, (base,))
    other.meta = dict(base.meta)


def _another_type(graph):
    sum_of(graph).args[1].meta["val"] = sum_of(graph).args[1].meta["val"].double()


def _not_ours(graph):
    del sum_of(graph).meta["peftc"]


def _not_scaled(graph):
    up = sum_of(graph).args[1]
    up.args = (up.args[0].args[0], up.args[1])


def _with_bias(graph):
    up = sum_of(graph).args[1]
    up.args = (*up.args, up.args[1])


def _computed_scale(graph):
    scaled = sum_of(graph).args[1].args[0]
    scaled.args = (scaled.args[0], scaled.args[0])


def _not_a_linear(graph):
    scaled = sum_of(graph).args[1].args[0]
    scaled.args[0].target = aten.relu.default


def _a_number(graph):
    sum_of(graph).args = (sum_of(graph).args[0], 1.0)


def _computed_by_another_operator(graph):
    sum_of(graph).args[0].target = aten.relu.default


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_a_number, "not a sum of two tensors"),
        (_not_ours, "not an adapter's"),
        (_with_bias, "the second operand is not a linear of its own"),
        (_not_scaled, "the linear's input is not scaled"),
        (_computed_scale, "the scale is not a slot"),
        (_not_a_linear, "what is scaled is not a linear"),
        (_base_read_twice, "the base's output is read elsewhere"),
        (_computed_by_another_operator, "the base's output is read elsewhere"),
        (_another_type, "the adapter computes in another type"),
    ],
)
def test_refusals(spoil, reason, lab):
    graph, _ = adapted(lab, TWO)
    assert FuseLowRank().check(sum_of(graph))
    spoil(graph)
    missed = FuseLowRank().check(sum_of(graph))
    assert isinstance(missed, Miss)
    assert not missed
    assert missed.reason == reason
    assert missed.node in graph.nodes


def test_a_refused_sum_stays(lab):
    graph, active = adapted(lab, TWO)
    _base_read_twice(graph)
    x, tensors = torch.randn(3, 2, 4), lab.tensors("Two") | active.tensors
    before = lab.run(graph, tensors, x)
    assert FuseLowRank().run(graph).made == 0
    assert_close(lab.run(graph, tensors, x), before)


def test_the_graph_it_came_from_is_untouched(lab):
    graph, _ = adapted(lab, ONE)
    before = lab.show(graph)
    FuseLowRank().run(copy_graph(graph))
    assert lab.show(graph) == before
