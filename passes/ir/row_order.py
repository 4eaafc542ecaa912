"""Whether the first axis of a value is still the rows of the call, in their order."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def _is_all(start: object, end: object, step: object) -> bool:
    return start in (0, None) and step == 1 and (end is None or (isinstance(end, int) and end > 2**31))


_MOVES: Mapping[Any, Callable[..., bool]] = {
    aten.transpose.int: lambda _, one, two: 0 in (one, two),
    aten.permute.default: lambda _, axes: axes[0] != 0,
    aten.t.default: lambda _: True,
    aten.flip.default: lambda _, axes: 0 in axes,
    aten.roll.default: lambda *_: True,
    aten.cat.default: lambda tensors, axis=0: axis == 0 and len(tensors) > 1,
    aten.stack.default: lambda tensors, axis=0: axis == 0,
    aten.index.Tensor: lambda _, places: places[0] is not None,
    aten.index_select.default: lambda _, axis, places: axis == 0,
    aten.gather.default: lambda _, axis, *more: axis == 0,
    aten.index_copy.default: lambda _, axis, *more: axis == 0,
    aten.index_add.default: lambda _, axis, *more: axis == 0,
    aten.scatter.src: lambda _, axis, *more: axis == 0,
    aten.slice.Tensor: lambda _, axis=0, start=0, end=None, step=1: axis == 0 and not _is_all(start, end, step),
    aten.narrow.default: lambda _, axis, *more: axis == 0,
    aten.select.int: lambda _, axis, *more: axis == 0,
    aten.split.Tensor: lambda _, size, axis=0: axis == 0,
    aten.chunk.default: lambda _, count, axis=0: axis == 0,
    aten.unbind.int: lambda _, axis=0: axis == 0,
    aten.sort.default: lambda _, axis=-1, *more: axis == 0,
    aten.repeat.default: lambda _, times: times[0] != 1,
    aten.masked_select.default: lambda *_: True,
    aten.nonzero.default: lambda *_: True,
}
"""Operators after which the first axis is another, or in another order, for these arguments."""


def has_rows_first(node: fx.Node, batch: int | torch.SymInt) -> bool:
    """Whether the first axis of a value is that of what the graph is given, alone or with others behind it.

    Only what has rows is looked at: what is computed of positions alone may be turned as it likes. So may a lone row.
    """
    if isinstance(batch, int) and batch == 1:
        return True
    left, seen = [node], {node}
    while left:
        each = left.pop()
        args: tuple[Any, ...] = each.args
        operands = [one for one in each.all_input_nodes if _has_rows(one, batch)]
        moves = _MOVES.get(each.target)
        if moves is not None and operands and moves(*args, **each.kwargs):
            return False
        left += [one for one in operands if one not in seen]
        seen.update(operands)
    return True


def _has_rows(node: fx.Node, batch: int | torch.SymInt) -> bool:
    """Whether an axis of a value is of the rows, alone or with others in one."""
    value = node.meta.get("val")
    return any(_is_of(size, batch) for each in _tensors(value) for size in each.shape)


def _tensors(value: object) -> list[torch.Tensor]:
    return [each for each in (value if isinstance(value, tuple | list) else (value,)) if isinstance(each, torch.Tensor)]


def _is_of(size: int | torch.SymInt, batch: int | torch.SymInt) -> bool:
    if isinstance(batch, torch.SymInt):
        return isinstance(size, torch.SymInt) and bool(batch.node.expr.free_symbols & size.node.expr.free_symbols)
    return isinstance(size, int) and size > 0 and size % batch == 0
