"""Finds where a graph attends: the operator, or the products with a softmax between that eager code makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftc.passes.ir.bodies import module_path
from peftc.passes.ir.pass_manager import Miss

aten = torch.ops.aten

OPERATOR = aten.scaled_dot_product_attention.default
SOFTMAX = (aten.softmax.int, aten._softmax.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default)
SHIFTED_PRODUCT = aten.baddbmm.default  # a bias, and the factors
VIEWS = (aten.view.default, aten.reshape.default)
SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
SUMS = (aten.add.Tensor, aten.add_.Tensor)
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar)
CHOICES = (aten.where.self, aten.where.ScalarOther)
SAME_SIZES = (
    *(aten.to.dtype, aten.type_as.default, aten.contiguous.default, aten.clone.default),
    *(aten.tanh.default, aten.dropout.default),
)


@dataclass(frozen=True)
class Mask:
    """What scores are masked with or changed by: `user` reads `node`, and `seen` in it leaves a score as it is."""

    node: fx.Node
    user: fx.Node
    seen: float | bool


@dataclass(frozen=True)
class Attention:
    """attention(query, key, value, masks), computed by `node`.

    `key` is `[rows, heads, tokens, size]` and `value` like it, or both `[rows * heads, tokens, size]`; they are read by
    `key_user` and `value_user`. `views` are reshapes of the scores, which name the number of keys.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    key_user: fx.Node
    value_user: fx.Node
    masks: tuple[Mask, ...] = ()
    views: tuple[fx.Node, ...] = ()
    is_causal: bool = False  # without a mask that says so

    @property
    def mask(self) -> fx.Node | None:
        """The mask, if there is one; of several, the last that is applied."""
        return self.masks[0].node if self.masks else None

    @property
    def module(self) -> str:
        """The innermost module that attends."""
        path = module_path(self.node)
        return path[-1] if path else ""


def attentions(graph: fx.Graph) -> list[Attention | Miss]:
    """Every attention of the trace itself, in order; a Miss is what looks like one and is not understood."""
    found: list[Attention | Miss] = []
    for node in graph.nodes:
        if "peftc" in node.meta:
            continue
        if node.target is OPERATOR:
            found.append(_of_operator(node))
        elif node.target in SOFTMAX:
            attends = _of_softmax(node)
            found += [attends] if attends is not None else []
    return found


def _of_operator(node: fx.Node) -> Attention:
    query, key, value, *rest = node.args
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False)) | node.kwargs
    mask = given.get("attn_mask")
    masks: tuple[Mask, ...] = ()
    if isinstance(mask, fx.Node):
        masks = (Mask(mask, node, True if mask.meta["val"].dtype == torch.bool else 0.0),)
    causal = bool(given.get("is_causal", False))
    return Attention(node, _node(query), _node(key), _node(value), node, node, masks, is_causal=causal)


def _of_softmax(softmax: fx.Node) -> Attention | Miss | None:
    """What eager code makes of attention; None where the softmax weighs no values."""
    views: list[fx.Node] = []
    product = _product(softmax, views)
    if product is None:
        return None
    dim = softmax.meta["val"].dim()
    if softmax.args[1] not in (-1, dim - 1):
        return Miss("the softmax is not over the last axis", softmax)
    masks: list[Mask] = []
    scores = _scores(_node(softmax.args[0]), masks, views)
    if isinstance(scores, Miss):
        return scores
    query, key = scores.args[-2:]
    read = _key(_node(key))
    if isinstance(read, Miss):
        return read
    key, user = read
    value = _node(product.args[1])
    return Attention(product, _node(query), key, value, user, product, tuple(masks), tuple(views))


def _product(softmax: fx.Node, views: list[fx.Node]) -> fx.Node | None:
    """The product of the probabilities with values."""
    node = softmax
    while node.meta["val"].dim() >= 3:
        after = [each for each in node.users if each.args and each.args[0] is node]
        for each in after:
            if each.target in PRODUCTS and each.meta["val"].dim() >= 3:
                return each
        following = [each for each in after if each.target in (*SAME_SIZES, *VIEWS, *SCALES)]
        if not following:
            return None
        node = following[0]
        views += [node] if node.target in VIEWS else []
    return None


def _scores(node: fx.Node, masks: list[Mask], views: list[fx.Node]) -> fx.Node | Miss:
    """The product of queries and keys that the scores come from."""
    if node.target in PRODUCTS:
        return node
    if node.target is SHIFTED_PRODUCT:
        masks.append(Mask(_node(node.args[0]), node, 0.0))
        return node
    if node.target in SAME_SIZES:
        return _scores(_node(node.args[0]), masks, views)
    if node.target in VIEWS:
        views.append(node)
        return _scores(_node(node.args[0]), masks, views)
    if node.target in SCALES:
        if not _is_number(node.args[1]):
            return Miss("scores are multiplied by a tensor", node)
        return _scores(_node(node.args[0]), masks, views)
    if node.target in FILLS:
        masks.append(Mask(_node(node.args[1]), node, False))
        return _scores(_node(node.args[0]), masks, views)
    if node.target in CHOICES and isinstance(node.args[1], fx.Node):
        masks.append(Mask(_node(node.args[0]), node, True))
        return _scores(node.args[1], masks, views)
    if node.target in SUMS:
        return _summed(node, masks, views)
    return Miss(f"scores go through {node.target}", node)


def _summed(node: fx.Node, masks: list[Mask], views: list[fx.Node]) -> fx.Node | Miss:
    """The scores in a sum of them and a mask, which stand on either side."""
    refused: Miss | None = None
    for scores, other in (node.args[:2], node.args[1::-1]):
        own: tuple[list[Mask], list[fx.Node]] = ([], [])
        found = _scores(scores, *own) if isinstance(scores, fx.Node) else Miss("no scores are added to", node)
        if isinstance(found, fx.Node):
            masks += [] if _is_number(other) else [Mask(_node(other), node, 0.0)]
            masks += own[0]
            views += own[1]
            return found
        refused = found if refused is None else refused
    assert refused is not None
    return refused


def _key(node: fx.Node) -> tuple[fx.Node, fx.Node] | Miss:
    """The keys under a transposition, and what transposes them."""
    while node.target in SAME_SIZES or (node.target in SCALES and _is_number(node.args[1])):
        node = _node(node.args[0])
    dim = node.meta["val"].dim()
    if node.target is aten.mT.default:
        return _node(node.args[0]), node
    if node.target is aten.transpose.int:
        swapped: Any = sorted(int(each) % dim for each in node.args[1:3])  # type: ignore[arg-type]
        if swapped == [dim - 2, dim - 1]:
            return _node(node.args[0]), node
    if node.target is aten.permute.default:
        order: Sequence[int] = node.args[1]  # type: ignore[assignment]
        if [int(each) % dim for each in order] == [*range(dim - 2), dim - 1, dim - 2]:
            return _node(node.args[0]), node
    return Miss(f"the keys are not transposed, they go through {node.target}", node)


def _is_number(value: object) -> bool:
    """A number, or a tensor that is one."""
    return not isinstance(value, fx.Node) or value.meta["val"].dim() == 0


def _node(value: object) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value
