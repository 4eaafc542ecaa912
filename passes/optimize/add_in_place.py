"""Lets the rows of trained tokens add themselves into the logits, for graphs that run as they are."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.ir.emit import Origin
from peftc.passes.ir.pass_manager import Change, Miss
from peftc.passes.ir.stages import Stage
from peftc.passes.quantized.packed_operators import PACKED_LINEAR

aten = torch.ops.aten

# Operators whose output is their own.
OWN = (aten.linear.default, PACKED_LINEAR, aten.addmm.default, aten.index_add_.default)


@dataclass(frozen=True)
class AddInPlace:
    """index_add(linear(h, W), -1, ids, d)  ->  index_add_(linear(h, W), -1, ids, d)

    Logits are the largest tensor of most calls, and so no second one is made. The linear's output has no other reader,
    and no backward needs it.
    """

    name: ClassVar[str] = "add-in-place"
    leaves: ClassVar[Stage] = Stage.FUSED

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        made, misses = 0, []
        for node in graph.find_nodes(op="call_function", target=aten.index_add.default):
            miss = self.check(node)
            if miss is None:
                node.target = aten.index_add_.default
                made += 1
            else:
                misses.append(miss)
        return Change(made=made, misses=tuple(misses))

    def check(self, node: fx.Node) -> Miss | None:
        """Why an addition is not an adapter's, or not into what nobody else reads."""
        into = node.args[0]
        if not isinstance(node.meta.get("peftc"), Origin):
            return Miss("not an adapter's", node)
        if not isinstance(into, fx.Node) or into.target not in OWN:
            return Miss("what it adds to has no output of its own", node)
        return Miss("what it adds to is read elsewhere", node) if len(into.users) > 1 else None
