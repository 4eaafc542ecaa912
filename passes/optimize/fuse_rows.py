"""Lets the product of each row's own matrices add itself into the base's output, for graphs that run as they are."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.stages import Stage
from peftc.passes.quantized.packed_operators import PACKED_LINEAR

aten = torch.ops.aten

OWN = (aten.linear.default, PACKED_LINEAR, aten.baddbmm_.default)


@dataclass(frozen=True)
class FuseRows:
    """y + bmm(h, B)  ->  baddbmm_(y, h, B), or baddbmm(y, h, B) where `y` is read elsewhere"""

    name: ClassVar[str] = "fuse-rows"
    leaves: ClassVar[Stage] = Stage.FUSED

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        made = 0
        for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
            base, product = node.args[:2]
            if not isinstance(base, fx.Node) or not isinstance(product, fx.Node) or node.kwargs:
                continue
            if not isinstance(node.meta.get("peftc"), Origin) or product.target is not aten.bmm.default:
                continue
            alike = base.meta["val"].dim() == 3 and base.meta["val"].dtype == product.meta["val"].dtype
            if not alike or len(product.users) != 1:
                continue
            emit = Emit(graph, node, node.meta["peftc"], like=node)
            own = base.target in OWN and len(base.users) == 1
            op = aten.baddbmm_.default if own else aten.baddbmm.default
            node.replace_all_uses_with(emit.call(op, base, *product.args))
            graph.erase_node(node)
            graph.erase_node(product)
            made += 1
        return Change(made=made)
