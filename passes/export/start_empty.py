"""Lets a graph that continues a text begin one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.stages import Stage
from peftc.passes.ir.values import refresh

aten = torch.ops.aten


@dataclass(frozen=True)
class StartEmpty:
    """f(x, past)  ->  f(x, nothing)

    `pasts` are inputs of keys or values, `[rows, heads, past, size]`; `like` is an input that has the rows, and stays.
    """

    pasts: Sequence[str]
    like: str
    name: ClassVar[str] = "start-empty"
    leaves: ClassVar[Stage] = Stage.PORTABLE

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        inputs = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
        found = [inputs[each] for each in self.pasts if each in inputs]
        if not found:
            return Change()
        like = inputs[self.like]
        emit = Emit(graph, list(inputs.values())[-1].next, Origin(self.name), like=like)
        rows = emit.call(aten.sym_size.int, like, 0)
        for node in found:
            value = emit.tensor(node)
            sizes = [rows, int(value.shape[1]), 0, int(value.shape[3])]
            node.replace_all_uses_with(emit.call(aten.new_zeros.default, like, sizes, dtype=value.dtype))
            graph.erase_node(node)
            for other in inputs.values():
                _shorten(other, value.shape[2])
        refresh(graph)
        return Change(made=len(emit.made), removed=len(found))

    def removes(self, node: fx.Node) -> bool:
        """The inputs."""
        return node.op == "placeholder" and node.target in self.pasts


def _shorten(node: fx.Node, past: int | torch.SymInt) -> None:
    """Let an input that counts what is past, as masks do, count it no more."""
    value = node.meta["val"]
    if not isinstance(past, torch.SymInt) or not any(_counts(size, past) for size in value.shape):
        return
    shape = [size - past if _counts(size, past) else size for size in value.shape]
    with value.fake_mode:
        node.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)


def _counts(size: int | torch.SymInt, past: torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) and past.node.expr in size.node.expr.free_symbols
