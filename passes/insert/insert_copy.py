"""Replaces tensors of the base by an adapter's own copies."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.stages import Stage
from peftc.passes.plan.structure import Structure, copy_slot, slot_role


@dataclass(frozen=True)
class InsertCopy:
    """f(T)  ->  f(T_of_the_adapter)

    For every tensor of a module that is trained as a whole: heads, norms, biases.
    """

    structure: Structure
    name: ClassVar[str] = "insert-copy"
    leaves: ClassVar[Stage] = Stage.ADAPTED

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        copies = {copy.target: copy for copy in self.structure.copies}
        made = 0
        for node in graph.find_nodes(op="get_attr"):
            copy = copies.get(str(node.target))
            if copy is None:
                continue
            base = node.meta["val"]
            with base.fake_mode:
                value = torch.empty_like(base, dtype=copy.dtype)
            emit = Emit(graph, node, Origin(self.name, copy.module), like=node)
            role = slot_role(copy.tensor)
            own = emit.slot(f"{copy_slot(copy.position, copy.module)}.{role}", value, copy.position, role)
            node.replace_all_uses_with(own)
            graph.erase_node(node)
            made += 1
        return Change(made=made)

    def removes(self, node: fx.Node) -> bool:
        """Reads of the tensors that are replaced."""
        return node.op == "get_attr" and node.target in {copy.target for copy in self.structure.copies}
