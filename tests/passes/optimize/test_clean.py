import sys

import pytest
import torch
from torch.testing import assert_close

from peftc.passes.ir import pass_manager
from peftc.passes.optimize.clean import Clean, is_check, is_identity

aten = torch.ops.aten


def cluttered(lab):
    """relu(x + x), with everything the exporter leaves lying about."""
    hand = lab.hand()
    x = hand.placeholder("x", 2, 3)
    hand.call(aten._assert_tensor_metadata.default, x, dtype=torch.float32)
    same = hand.call(aten.to.dtype, x, torch.float32)
    whole = hand.call(aten.slice.Tensor, same, 1, 0, sys.maxsize)
    hand.call(aten.neg.default, whole)
    twice = hand.call(aten.add.Tensor, whole, x)
    return hand.done(hand.call(aten.relu.default, twice))


def test_golden(lab, golden):
    graph = cluttered(lab)
    change = pass_manager.run(graph, [Clean()]).changes["clean"]
    assert change == pass_manager.Change(removed=4)
    golden("passes/optimize/clean.txt", lab.show(graph))


def test_numbers(lab):
    x = torch.randn(2, 3)
    graph = cluttered(lab)
    before = lab.run(graph, {}, x)
    Clean().run(graph)
    assert_close(lab.run(graph, {}, x), before)
    assert_close(before, torch.relu(2 * x))


def test_twice_is_once(lab):
    graph = cluttered(lab)
    Clean().run(graph)
    once = lab.show(graph)
    assert Clean().run(graph) == pass_manager.Change()
    assert lab.show(graph) == once


def test_a_real_trace_has_no_check_left(lab):
    graph = lab.graph("Two")
    pass_manager.run(graph, [Clean()])
    assert not [node for node in graph.nodes if is_check(node) or is_identity(node)]


@pytest.mark.parametrize(
    ("op", "arguments", "gone"),
    [
        (aten.to.dtype, (torch.float32,), True),
        (aten.to.dtype, (torch.float64,), False),
        (aten.to.dtype, (torch.float32, False, True), False),
        (aten.to.device, (torch.device("cpu"), torch.float32), True),
        (aten.slice.Tensor, (0, 0, sys.maxsize), True),
        (aten.slice.Tensor, (0, 0, sys.maxsize, 1), True),
        (aten.slice.Tensor, (0, 0, sys.maxsize, 2), False),
        (aten.slice.Tensor, (0, 1, sys.maxsize), False),
        (aten.slice.Tensor, (0, 0, 1), False),
        (aten.relu.default, (), False),
        (aten.to.dtype, (torch.float32, False, False, torch.contiguous_format), False),
    ],
    ids=str,
)
def test_what_is_an_identity(op, arguments, gone, lab):
    hand = lab.hand()
    node = hand.call(op, hand.placeholder("x", 2, 3), *arguments)
    assert is_identity(node) is gone


def test_a_copy_asked_for_by_name_stays(lab):
    hand = lab.hand()
    node = hand.call(aten.to.dtype, hand.placeholder("x", 2, 3), torch.float32, copy=True)
    assert not is_identity(node)


def test_keep_casts(lab):
    graph = cluttered(lab)
    Clean(keep_casts=True).run(graph)
    assert len(graph.find_nodes(op="call_function", target=aten.to.dtype)) == 1
    assert not graph.find_nodes(op="call_function", target=aten.slice.Tensor)


def test_writes_survive_dead_code(lab):
    """BatchNorm's counter: nobody reads the result of the addition, but the buffer must be written."""
    hand = lab.hand()
    x = hand.placeholder("x", 2)
    counter = hand.attribute("counter", 2)
    hand.call(aten.add_.Tensor, counter, x)
    hand.call(aten.add.Tensor, counter, x)
    graph = hand.done(x)
    Clean().run(graph)
    held = torch.zeros(2)
    lab.run(graph, {"counter": held}, torch.ones(2))
    assert_close(held, torch.ones(2))
    assert not graph.find_nodes(op="call_function", target=aten.add.Tensor)
