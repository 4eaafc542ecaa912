"""Lets attention read grouped keys and values as they are."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.pass_manager import Change, Miss
from peftc.passes.ir.stages import Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class GroupHeads:
    """sdpa(q, repeat(k), repeat(v))  ->  sdpa(q, k, v, enable_gqa = True)

    A trace repeats grouped keys and values, `[b, h, t, d] -> [b, g * h, t, d]`, because there is a mask; the kernel
    needs no copy of them, which at one token is most of the work.
    """

    name: ClassVar[str] = "group-heads"
    leaves: ClassVar[Stage] = Stage.PORTABLE

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        made, misses = 0, []
        for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            keys, values = repeated(node.args[1]), repeated(node.args[2])
            if keys is None or values is None or node.kwargs.get("enable_gqa"):
                misses.append(Miss("its keys and values are not repeated, or are by itself", node))
                continue
            emit = Emit(graph, node, Origin(self.name), like=node)
            grouped = emit.call(
                node.target, node.args[0], keys, values, *node.args[3:], **{**node.kwargs, "enable_gqa": True}
            )
            node.replace_all_uses_with(grouped)
            graph.erase_node(node)
            made += 1
        if made:
            graph.eliminate_dead_code()
        return Change(made=made, misses=tuple(misses))


def repeated(node: object) -> fx.Node | None:
    """x of `reshape(expand(unsqueeze(x, 2), [b, h, g, t, d]), [b, h * g, t, d])`, or None."""
    if not isinstance(node, fx.Node) or node.target is not aten.reshape.default:
        return None
    expanded = node.args[0]
    if not isinstance(expanded, fx.Node) or expanded.target is not aten.expand.default:
        return None
    unsqueezed = expanded.args[0]
    if not isinstance(unsqueezed, fx.Node) or unsqueezed.target is not aten.unsqueeze.default:
        return None
    x = unsqueezed.args[0]
    if not isinstance(x, fx.Node) or unsqueezed.args[1] != 2 or x.meta["val"].dim() != 4:
        return None
    heads, groups = expanded.meta["val"].shape[1:3]
    return x if node.meta["val"].shape[1] == heads * groups and node.meta["val"].dim() == 4 else None
