"""Makes a graph believe that its inputs are longer: virtual tokens stand in front of the real ones.

A graph reads every size off its inputs, so it is enough to change these: whatever depends on an input gets the longer
one; `refresh` then gives every node behind them the value that it has now.
"""

import operator
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.inputs import SOURCE, describe, inputs_of

aten = torch.ops.aten


def is_done(graph: fx.Graph, name: str) -> bool:
    """Whether a pass has been here."""
    return any(isinstance(o := node.meta.get("peftc"), Origin) and o.made_by == name for node in graph.nodes)


def first_node(graph: fx.Graph) -> fx.Node:
    """The first node after the inputs: nothing before it reads any."""
    return list(graph.find_nodes(op="placeholder"))[-1].next


def put_for(node: fx.Node, wider: fx.Node, emit: Emit, keep: Collection[fx.Node] = ()) -> None:
    """Let every reader of `node` read `wider`, but what was emitted to make it and those to `keep`."""
    made = set(emit.made)
    node.replace_all_uses_with(wider, delete_user_cb=lambda user: user not in made and user not in keep)


def rows_of(emit: Emit, node: fx.Node) -> fx.Node:
    """The size of the first axis."""
    return emit.call(aten.sym_size.int, node, 0)


def led_by(emit: Emit, node: fx.Node, length: int, value: float, axis: int = 1) -> fx.Node:
    """`node` with `length` times a value in front, along an axis."""
    sizes: list[Any] = [emit.call(aten.sym_size.int, node, each) for each in range(emit.tensor(node).dim())]
    sizes[axis] = length
    lead = emit.call(aten.new_full.default, node, sizes, value)
    return emit.call(aten.cat.default, [lead, node], axis)


def lengthen_encoded(graph: fx.Graph, length: int) -> None:
    """Let inputs that an encoder made be `length` longer, as they are where virtual tokens stood before its text."""
    for node, spec in inputs_of(graph).items():
        if not spec.is_encoded or (SOURCE,) not in spec.axes:
            continue
        value = node.meta["val"]
        longer = [size + length if spec.axes[axis] == (SOURCE,) else size for axis, size in enumerate(value.shape)]
        with value.fake_mode:
            node.meta["val"] = torch.empty(longer, dtype=value.dtype, device=value.device)
        describe(node, replace(spec, axes=tuple((SOURCE, length) if size == (SOURCE,) else size for size in spec.axes)))


def wider_mask(emit: Emit, mask: fx.Node, length: int, *, queries: bool) -> fx.Node:
    """A mask that lets everything see `length` more places in front.

    `[rows, keys]` gets ones; `[rows, heads, queries, keys]`, true or 0 where there is something to see, gets these.
    With `queries` the places in front look too, each at those before it and itself.
    """
    value = emit.tensor(mask)
    if value.dim() == 2:
        return led_by(emit, mask, length, 1)
    seen = True if value.dtype == torch.bool else 0.0
    wide = led_by(emit, mask, length, seen, axis=3)
    if not queries:
        return wide
    unseen = False if value.dtype == torch.bool else torch.finfo(value.dtype).min
    rows, heads = (emit.call(aten.sym_size.int, mask, axis) for axis in (0, 1))
    keys = emit.call(aten.sym_size.int, wide, 3)
    own = emit.call(aten.new_full.default, mask, [length, length], seen)
    hidden = emit.call(aten.new_full.default, mask, [length, length], unseen)
    lower = emit.call(
        aten.tril.default, emit.call(aten.new_full.default, mask, [length, length], True, dtype=torch.bool)
    )
    causal = emit.call(aten.where.self, lower, own, hidden)
    rest = emit.call(aten.sym_size.int, mask, 3)
    blind = emit.call(aten.new_full.default, mask, [length, rest], unseen)
    front = emit.call(aten.cat.default, [causal, blind], 1)
    front = emit.call(aten.expand.default, front, [rows, heads, length, keys])
    return emit.call(aten.cat.default, [front, wide], 2)


def behind_padding(emit: Emit, mask: fx.Node, length: int) -> fx.Node:
    """For every place of a widened text `[rows, length + tokens]`, what of `virtual tokens, text` stands there.

    The virtual tokens stand before the first real one: padding on the left, by `mask` `[rows, tokens]`, comes first.
    """
    real = emit.call(aten.ne.Scalar, mask, 0)
    counted = emit.call(aten.cumsum.default, emit.call(aten.to.dtype, real, torch.int64), 1)
    pads = emit.call(aten.sum.dim_IntList, emit.call(aten.eq.Scalar, counted, 0), [1], True)
    width = emit.call(operator.add, emit.call(aten.sym_size.int, mask, 1), length)
    places = emit.call(aten.arange.default, width, device=emit.tensor(mask).device)
    places = emit.call(aten.unsqueeze.default, places, 0)
    after = emit.call(aten.sub.Tensor, places, pads)
    is_padding, is_before_text = emit.call(aten.lt.Scalar, after, 0), emit.call(aten.lt.Scalar, after, length)
    text = emit.call(aten.where.self, is_padding, emit.call(aten.add.Tensor, places, length), places)
    is_virtual = emit.call(aten.logical_and.default, emit.call(aten.logical_not.default, is_padding), is_before_text)
    return emit.call(aten.where.self, is_virtual, after, text)


def in_order(emit: Emit, node: fx.Node, order: fx.Node) -> fx.Node:
    """`node` `[rows, places, ...]` with its places in another order `[rows, places]`."""
    for _ in range(emit.tensor(node).dim() - 2):
        order = emit.call(aten.unsqueeze.default, order, -1)
    if emit.tensor(node).dim() > 2:
        sizes = [-1, -1, *(int(each) for each in emit.tensor(node).shape[2:])]
        order = emit.call(aten.expand.default, order, sizes)
    return emit.call(aten.gather.default, node, 1, order)


def outputs(graph: fx.Graph) -> list[Any]:
    """The flat outputs of a graph."""
    (node,) = graph.find_nodes(op="output")
    return list(node.args[0])


def set_outputs(graph: fx.Graph, values: list[Any]) -> None:
    """Let the graph return these."""
    (node,) = graph.find_nodes(op="output")
    node.args = (tuple(values),)


def pairs(nodes: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Keys and values, which alternate."""
    return zip(nodes[::2], nodes[1::2], strict=True)
