import pytest
import torch

from peftc.passes.ir.row_order import has_rows_first

aten = torch.ops.aten
BATCH = 3


def _first_places(call, x):
    return call(aten.select.int, call(aten.argmax.default, x, 2), 1, 0)


KEPT = {
    "a linear": lambda call, x, w: call(aten.linear.default, x, w),
    "turned behind": lambda call, x, w: call(aten.transpose.int, x, 1, 2),
    "flattened": lambda call, x, w: call(aten.view.default, x, [15, 4]),
    "joined behind": lambda call, x, w: call(aten.cat.default, [x, x], 1),
    "all of it": lambda call, x, w: call(aten.slice.Tensor, x, 0, 0, 2**62),
    "a weight turned": lambda call, x, w: call(aten.matmul.default, x, call(aten.transpose.int, w, 0, 1)),
}
MOVED = {
    "turned": lambda call, x, w: call(aten.transpose.int, x, 0, 1),
    "permuted": lambda call, x, w: call(aten.permute.default, x, [1, 0, 2]),
    "joined": lambda call, x, w: call(aten.cat.default, [x, x]),
    "backwards": lambda call, x, w: call(aten.flip.default, x, [0]),
    "picked": lambda call, x, w: call(aten.index_select.default, x, 0, _first_places(call, x)),
    "a part": lambda call, x, w: call(aten.slice.Tensor, x, 0, 1, 3),
    "turned, and then more": lambda call, x, w: call(aten.relu.default, call(aten.transpose.int, x, 0, 1)),
}


@pytest.mark.parametrize(("name", "kept"), [*((name, True) for name in KEPT), *((name, False) for name in MOVED)])
def test_the_first_axis(name, kept, lab):
    hand = lab.hand()
    x, w = hand.placeholder("x", BATCH, 5, 4), hand.attribute("w", 4, 4)
    node = (KEPT | MOVED)[name](hand.call, x, w)
    assert has_rows_first(node, BATCH) is kept


@pytest.mark.parametrize("name", MOVED)
def test_a_lone_row_is_everything(name, lab):
    hand = lab.hand()
    node = MOVED[name](hand.call, hand.placeholder("x", 1, 5, 4), hand.attribute("w", 4, 4))
    assert has_rows_first(node, 1)
