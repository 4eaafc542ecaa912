import pytest
import torch
from torch.testing import assert_close

from peftc.passes.ir import pass_manager
from peftc.passes.ir.emit import Origin
from peftc.passes.optimize.fuse_rows import FuseRows
from peftc.passes.optimize.native import NativeCalls

aten = torch.ops.aten


def graph_of(lab, *, ours=True, read_elsewhere=False):
    hand = lab.hand()
    x, w = hand.placeholder("x", 3, 5, 4), hand.attribute("w", 6, 4)
    down, up = hand.placeholder("down", 3, 4, 2), hand.placeholder("up", 3, 2, 6)
    base, low = hand.call(aten.linear.default, x, w), hand.call(aten.bmm.default, x, down)
    total = hand.call(aten.add.Tensor, base, hand.call(aten.bmm.default, low, up))
    if ours:
        total.meta["peftc"] = Origin("insert-delta", "first")
    return hand.done(total, *([base] if read_elsewhere else []))


def targets(graph):
    return [node.target for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("read_elsewhere", [False, True])
def test_numbers(read_elsewhere, lab):
    graph = graph_of(lab, read_elsewhere=read_elsewhere)
    inputs = {"x": torch.randn(3, 5, 4), "down": torch.randn(3, 4, 2), "up": torch.randn(3, 2, 6)}
    tensors = {"w": torch.randn(6, 4)}
    wanted = lab.results(graph, tensors, **inputs)
    assert pass_manager.run(graph, [FuseRows()], full=True).changes["fuse-rows"].made == 1
    fused = aten.baddbmm.default if read_elsewhere else aten.baddbmm_.default
    assert targets(graph) == [aten.linear.default, aten.bmm.default, fused]
    assert_close(lab.results(graph, tensors, **inputs), wanted)
    assert FuseRows().run(graph).made == 0
    pass_manager.run(graph, [NativeCalls()])
    assert_close(lab.results(graph, tensors, **inputs), wanted)


def test_what_is_not_an_adapters_stays(lab):
    graph = graph_of(lab, ours=False)
    assert FuseRows().run(graph).made == 0
