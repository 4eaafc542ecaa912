"""Turns a boolean attention mask into numbers once, instead of in every layer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.stages import Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class FloatMask:
    """sdpa(q, k, v, m)  ->  sdpa(q, k, v, 0 where m else -inf)

    The operator does the same inside, each time it is called.
    """

    name: ClassVar[str] = "float-mask"
    leaves: ClassVar[Stage] = Stage.PORTABLE

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            mask = _boolean_mask(node)
            if mask is None:
                continue
            dtype = node.args[0].meta["val"].dtype
            if (mask, dtype) not in made:
                emit = Emit(graph, mask.next, Origin(self.name), like=mask)
                zeros = emit.call(aten.zeros_like.default, mask, dtype=dtype)
                hidden = emit.call(aten.logical_not.default, mask)
                made[mask, dtype] = emit.call(aten.masked_fill.Scalar, zeros, hidden, float("-inf"))
            _replace(node, mask, made[mask, dtype])
        return Change(made=len(made))

    def removes(self, node: fx.Node) -> bool:
        """Attention under a boolean mask."""
        return node.target is aten.scaled_dot_product_attention.default and _boolean_mask(node) is not None


def _boolean_mask(attention: fx.Node) -> fx.Node | None:
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) and mask.meta["val"].dtype == torch.bool else None


def _replace(node: fx.Node, mask: fx.Node, number: fx.Node) -> None:
    node.args = tuple(number if each is mask else each for each in node.args)
    node.kwargs = {name: number if each is mask else each for name, each in node.kwargs.items()}
