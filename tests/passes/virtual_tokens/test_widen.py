import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.values import refresh
from peftc.passes.virtual_tokens import widen

aten = torch.ops.aten
LENGTH = 3


@pytest.fixture
def bench(lab):
    """`bench(build, x)`: what nodes that `build` emits over an input of these values come to."""

    def run(build, x):
        hand = lab.hand()
        node = hand.placeholder("x", *x.shape, dtype=x.dtype)
        graph = hand.done(node)
        (output,) = graph.find_nodes(op="output")
        emit = Emit(graph, output, Origin("test"), like=node)
        made = build(emit, node)
        assert made.meta["val"].shape == lab.results(_returning(graph, made), {}, x=x)[0].shape
        return lab.results(graph, {}, x=x)[0]

    return run


def _returning(graph, node):
    widen.set_outputs(graph, [node])
    return graph


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_led_by(axis, bench):
    x = torch.randint(9, (2, 4, 5))
    got = bench(lambda emit, node: widen.led_by(emit, node, LENGTH, 7, axis), x)
    lead = x.new_full([LENGTH if each == axis else size for each, size in enumerate(x.shape)], 7)
    assert got.dtype == x.dtype
    assert torch.equal(got, torch.cat([lead, x], axis))


def test_a_mask_of_keys(bench):
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    for queries in (False, True):
        got = bench(lambda emit, node, queries=queries: widen.wider_mask(emit, node, LENGTH, queries=queries), mask)
        assert torch.equal(got, F.pad(mask, (LENGTH, 0), value=1))


def causal(dtype, now=4, past=0):
    seen = torch.ones(now, past + now, dtype=torch.bool).tril(past).repeat(2, 1, 1, 1)
    seen[0, ..., 0] = False
    return seen if dtype == torch.bool else torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_a_mask_of_queries_and_keys(dtype, bench):
    mask = causal(dtype, past=2)
    got = bench(lambda emit, node: widen.wider_mask(emit, node, LENGTH, queries=False), mask)
    assert got.dtype == dtype
    seen = got if dtype == torch.bool else got == 0
    assert seen[..., :LENGTH].all()
    assert torch.equal(got[..., LENGTH:], mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_a_mask_where_virtual_tokens_look_too(dtype, bench):
    """What a causal mask would be for the longer text, with the padding where it was."""
    got = bench(lambda emit, node: widen.wider_mask(emit, node, LENGTH, queries=True), causal(dtype))
    seen = torch.ones(LENGTH + 4, LENGTH + 4, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    seen[0, ..., LENGTH] = False
    wanted = seen if dtype == torch.bool else torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
    assert torch.equal(got, wanted)


MASKS = [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]


def test_virtual_tokens_behind_padding(bench):
    got = bench(lambda emit, node: widen.behind_padding(emit, node, LENGTH), torch.tensor(MASKS))
    virtual = list(range(LENGTH))
    for row, mask in zip(got.tolist(), MASKS, strict=True):
        pads = mask.index(1) if 1 in mask else len(mask)
        own = [LENGTH + index for index in range(len(mask))]
        assert row == own[:pads] + virtual + own[pads:]


@pytest.mark.parametrize("more", [(), (2,), (2, 3)])
def test_in_order(more, bench):
    x, order = torch.randn(2, 4, *more), torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]])

    def build(emit, node):
        rows = [emit.call(aten.new_full.default, node, [2, 1], index, dtype=torch.int64) for index in order[0].tolist()]
        return widen.in_order(emit, node, emit.call(aten.cat.default, rows, 1))

    assert torch.equal(bench(build, x), x[:, order[0]])


def test_put_for_spares_what_makes_the_wider_one(lab):
    hand = lab.hand()
    x = hand.placeholder("x", 2, 4)
    first, second = hand.call(aten.neg.default, x), hand.call(aten.exp.default, x)
    graph = hand.done(first, second, x)
    emit = Emit(graph, widen.first_node(graph), Origin("test"), like=x)
    wide = widen.led_by(emit, x, LENGTH, 0.5)
    widen.put_for(x, wide, emit, keep=[second])
    assert refresh(graph) == 1, "the one that reads what is wider"
    assert [node.meta["val"].shape for node in (wide, first, second)] == [(2, 4 + LENGTH), (2, 4 + LENGTH), (2, 4)]
    given = torch.randn(2, 4)
    longer = F.pad(given, (LENGTH, 0), value=0.5)
    assert_close(lab.results(graph, {}, x=given), (-longer, given.exp(), longer))


def test_inputs_and_outputs(lab):
    hand = lab.hand()
    weight, x, y = hand.attribute("w", 2), hand.placeholder("x", 2), hand.placeholder("y", 2)
    total = hand.call(aten.add.Tensor, x, y)
    graph = hand.done(total, weight)
    assert widen.first_node(graph) is total
    assert widen.outputs(graph) == [total, weight]
    widen.set_outputs(graph, [y])
    assert widen.outputs(graph) == [y]
    assert list(widen.pairs([1, 2, 3, 4])) == [(1, 2), (3, 4)]
    with pytest.raises(ValueError, match="shorter"):
        list(widen.pairs([1, 2, 3]))
