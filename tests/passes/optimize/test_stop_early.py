import pytest
import torch
from torch.testing import assert_close

from peftc.passes.insert.insert_delta import InsertDelta
from peftc.passes.ir import pass_manager
from peftc.passes.ir.emit import Origin
from peftc.passes.ir.pass_manager import Miss
from peftc.passes.optimize.clean import Clean
from peftc.passes.optimize.stop_early import StopEarly

aten = torch.ops.aten
DORA = "adapter a = dora(rank = 2, alpha = 6) { on first }"


def adapted(lab, dense=()):
    active = lab.active("Two", DORA)
    graph = lab.graph("Two")
    pass_manager.run(graph, [Clean(), InsertDelta(active.structure, active.slot_value, True, frozenset(dense))])
    return graph, active


def stopped(lab, dense=()):
    graph, active = adapted(lab, dense)
    change = pass_manager.run(graph, [StopEarly()]).changes["stop-early"]
    return graph, active, change


def stops(graph):
    return graph.find_nodes(op="call_function", target=aten.detach.default)


def test_golden(lab, golden):
    """The norm is computed of what has no gradient."""
    graph, *_ = stopped(lab)
    golden("passes/optimize/stop_early.txt", lab.show(graph))


@pytest.mark.parametrize("dense", [(), ("first",)], ids=["pushed", "dense"])
def test_numbers_and_gradients(dense, lab):
    x, found = torch.randn(3, 2, 4), []
    for graph, active in (adapted(lab, dense), stopped(lab, dense)[:2]):
        leaves = {
            name: each.detach().clone().requires_grad_() if isinstance(each, torch.Tensor) and each.dim() else each
            for name, each in (lab.tensors("Two") | active.tensors).items()
        }
        output = lab.run(graph, leaves, x)
        output.square().sum().backward()
        trained = [each for each in active.tensors if each.endswith((".A", ".B", ".m"))]
        found.append({"output": output, **{name: leaves[name].grad for name in [*trained, "first.weight"]}})
    for name, value in found[0].items():
        assert value.abs().max() > 0, name
        assert_close(found[1][name], value, msg=name)
    with pytest.raises(AssertionError):
        assert_close(found[1]["output"], lab.model("Two")(x))


def test_twice_is_once(lab):
    graph, _, change = stopped(lab)
    assert change.made
    once = lab.show(graph)
    assert StopEarly().run(graph).made == 0
    assert lab.show(graph) == once


def test_nothing_is_kept_of_what_is_stopped(lab):
    """A tensor detached late keeps what it was made from, as long as it is there itself."""
    kept = []
    for graph, active in (adapted(lab), stopped(lab)[:2]):
        tensors = {key: each.detach() for key, each in lab.tensors("Two").items()} | active.tensors
        slot = "slots.p0__first."
        tensors |= {f"{slot}{role}": tensors[f"{slot}{role}"].clone().requires_grad_() for role in "ABm"}
        shapes: list[torch.Size] = []

        def pack(tensor: torch.Tensor, shapes: list[torch.Size] = shapes) -> torch.Tensor:
            shapes.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
            lab.run(graph, tensors, torch.randn(5, 2, 4))
        kept.append(torch.Size([6, 4]) in shapes)
    assert kept == [True, False]


def _of_a_parameter(hand, x):
    return hand.call(aten.detach.default, hand.attribute("slot.A", 2, 4))


def _of_the_model(hand, x):
    return hand.call(aten.detach.default, _ours(hand.call(aten.relu.default, x)))


def _read_twice(hand, x):
    value = _ours(hand.call(aten.relu.default, x))
    hand.call(aten.neg.default, value)
    return _ours(hand.call(aten.detach.default, value))


def _stopped_already(hand, x):
    return _ours(hand.call(aten.detach.default, _ours(hand.call(aten.detach.default, x))))


def _of_an_activation(hand, x):
    return _ours(hand.call(aten.detach.default, hand.call(aten.relu.default, x)))


def _ours(node):
    node.meta["peftc"] = Origin("insert-delta", "site")
    return node


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_of_a_parameter, "the model itself stops this gradient"),
        (_of_the_model, "the model itself stops this gradient"),
        (_read_twice, "what else reads the value has a gradient"),
        (_stopped_already, "the gradient is stopped already"),
        (_of_an_activation, "the value is a tensor of the model's or of an adapter's, or an activation"),
    ],
)
def test_refusals(build, reason, lab):
    hand = lab.hand()
    stop = build(hand, hand.placeholder("x", 5, 4))
    graph = hand.done(stop)
    before = lab.show(graph)
    found = StopEarly().check(stop)
    assert isinstance(found, Miss)
    assert found.reason == reason
    StopEarly().run(graph)
    if build is not _stopped_already:  # of the two, the inner one stops an activation where it is
        assert lab.show(graph) == before
