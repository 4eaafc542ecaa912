import pytest
import torch
from torch.testing import assert_close

from peftc.passes.ir import pass_manager
from peftc.passes.ir.emit import Origin
from peftc.passes.optimize.fuse_rows import FuseRows
from peftc.passes.optimize.native import NativeCalls
from peftc.passes.route.group_rows import GroupRows, added, added_, grouped, multiplied, ungrouped
from peftc.runtime.mixed_batch.groups import groups_of

aten = torch.ops.aten

ADAPTERS, ROWS = 3, [2, 0, 2, 2]
GROUPS, PLACES = groups_of(ROWS, ADAPTERS, torch.device("cpu"))
NONE = torch.empty(0, dtype=torch.int64)


def graph_of(lab, *, read_elsewhere=False, flat=False, product=aten.bmm.default):
    hand = lab.hand()
    x, w = hand.placeholder("x", 4, *([] if flat else [5]), 4), hand.attribute("w", 6, 4)
    down, up = hand.attribute("routed.p0", 4, 4, 2), hand.attribute("routed.p1", 4, 2, 6)
    base = hand.call(aten.linear.default, x, w)
    if flat:
        low = hand.call(aten.matmul.default, hand.call(aten.unsqueeze.default, x, 1), down)
        high = hand.call(aten.squeeze.dim, hand.call(aten.matmul.default, low, up), 1)
    else:
        low = hand.call(product, x, down)
        high = hand.call(product, low, up)
    total = hand.call(aten.add.Tensor, base, high)
    total.meta["peftc"] = Origin("insert-delta", "first")
    more = [hand.call(aten.sum.default, down)] if read_elsewhere else []
    return hand.done(total, *more)


def targets(graph):
    return [node.target for node in graph.nodes if node.op == "call_function"]


def values(flat=False):
    torch.manual_seed(0)
    x, w = torch.randn(4, *([] if flat else [5]), 4), torch.randn(6, 4)
    down, up = torch.randn(ADAPTERS, 4, 2), torch.randn(ADAPTERS, 2, 6)
    return x, w, down, up


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("product", [aten.bmm.default, aten.matmul.default])
def test_as_they_lie_and_by_row(product, flat, native, lab):
    graph = graph_of(lab, flat=flat, product=product)
    x, w, down, up = values(flat)
    by_row = {"w": w, "routed.p0": down[ROWS], "routed.p1": up[ROWS], "routed.groups": NONE, "routed.places": NONE}
    as_they_lie = by_row | {"routed.p0": down, "routed.p1": up, "routed.groups": GROUPS, "routed.places": PLACES}
    wanted = lab.results(graph, by_row, x=x)
    group = GroupRows()
    pipeline = [FuseRows(), group, *([NativeCalls()] if native else [])]
    assert pass_manager.run(graph, pipeline, full=True).changes["group-rows"].made == 2
    assert group.matrices == {"p0", "p1"}
    for tensors in (by_row, as_they_lie):
        assert_close(lab.results(graph, tensors, x=x), wanted)
    assert GroupRows().run(graph).made == 0


def test_what_stays_in_a_row_is_moved_once(lab):
    graph = graph_of(lab)
    pass_manager.run(graph, [FuseRows(), GroupRows()], full=True)
    assert targets(graph) == [aten.linear.default, grouped, multiplied, added_]


def test_what_is_read_in_another_way_too_is_had_by_row(lab):
    graph, group = graph_of(lab, read_elsewhere=True), GroupRows()
    x, w, down, up = values()
    tensors = {"w": w, "routed.p0": down[ROWS], "routed.p1": up[ROWS]}
    wanted = lab.results(graph, tensors, x=x)
    pass_manager.run(graph, [FuseRows(), group], full=True)
    assert group.matrices == {"p1"}
    tensors |= {"routed.p1": up, "routed.groups": GROUPS, "routed.places": PLACES}
    assert_close(lab.results(graph, tensors, x=x), wanted)


def test_what_is_each_rows_for_all_is_left(lab):
    hand = lab.hand()
    x, bias = hand.placeholder("x", 4, 5, 4), hand.attribute("routed.p0", 4, 1, 4)
    graph = hand.done(hand.call(aten.add.Tensor, x, bias))
    assert GroupRows().run(graph).made == 0


def test_gradients():
    x, w, down, up = (each.requires_grad_() for each in values())
    found = []
    for groups, places, pick in ((GROUPS, PLACES, slice(None)), (NONE, NONE, ROWS)):
        h = torch.bmm(grouped(x, groups), down[pick])
        for add in (added, added_):
            y = add(torch.nn.functional.linear(x, w), h, up[pick], groups, places)
            y = y + ungrouped(torch.bmm(h, up[pick]), groups, places)
            found.append(torch.autograd.grad(y.square().sum(), (x, w, down, up), retain_graph=True))
    for each in found[1:]:
        assert_close(each, found[0])
