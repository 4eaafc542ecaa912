"""Where a row that has not a lane needs no telling apart: what its zeros add is zero."""

from collections.abc import Collection

import torch
from torch import fx

aten = torch.ops.aten

# What is zero where any operand is; and where the first is.
_PRODUCTS = frozenset(
    (aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mul.Tensor, aten.einsum.default)
)
_LIKE_FIRST = frozenset(
    (
        aten.to.dtype,
        aten.neg.default,
        aten.dropout.default,
        aten.view.default,
        aten.reshape.default,
        aten.transpose.int,
        aten.permute.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.constant_pad_nd.default,
        aten.sum.dim_IntList,
        aten.div.Tensor,
        aten.embedding.default,
    )
)


def simplify(graph: fx.Graph, fixed: Collection[fx.Node]) -> None:
    """where(member, y + d, y)  ->  y + d, where d is zero if what it has of an adapter (`fixed`) is"""
    for node in graph.find_nodes(op="call_function", target=aten.where.self):
        member, made, before = node.args
        if member in fixed and isinstance(made, fx.Node) and _is_sum(made, before, fixed):
            node.replace_all_uses_with(made)
            graph.erase_node(node)


def _is_sum(made: fx.Node, before: object, fixed: Collection[fx.Node]) -> bool:
    """Whether a value is another one plus what vanishes, cast to its type."""
    while made is not before:
        adds = made.target is aten.add.Tensor and not made.kwargs and vanishes(made.args[1], fixed)
        if not adds and made.target is not aten.to.dtype:
            return False
        made = made.args[0]  # type: ignore[assignment]
    return True


def vanishes(node: object, fixed: Collection[fx.Node]) -> bool:
    """Whether a value is zero where all that is computed of an adapter is, as long as everything is finite."""
    if not isinstance(node, fx.Node):
        return False
    if node in fixed:
        return True
    if node.target in _PRODUCTS:
        if node.target is aten.linear.default and len(node.args) > 2:
            return False
        return any(vanishes(each, fixed) for each in node.all_input_nodes)
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        return all(vanishes(each, fixed) for each in node.args[:2])
    return node.target in _LIKE_FIRST and vanishes(node.args[0], fixed)
