"""Remove what does nothing."""

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.stages import Stage

aten = torch.ops.aten

CHECKS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default)
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other)


@dataclass(frozen=True)
class Clean:
    """f(identity(x))  ->  f(x)

    Drops the exporter's assertions, casts to the type a tensor already has, slices of a whole axis and dead code.
    `keep_casts` leaves casts alone: under autocast a tensor's type is not the one it was traced with.
    """

    keep_casts: bool = False

    name: ClassVar[str] = "clean"
    leaves: ClassVar[Stage] = Stage.CLEANED

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        before = len(graph.nodes)
        for node in list(graph.nodes):
            if is_check(node):
                graph.erase_node(node)
            elif is_identity(node) and not (self.keep_casts and node.target in CASTS):
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.erase_node(node)
        graph.eliminate_dead_code(_is_impure)
        return Change(removed=before - len(graph.nodes))


def is_check(node: fx.Node) -> bool:
    """An assertion of the exporter's, or the guard function it puts in front."""
    return node.target in CHECKS or (node.op == "call_module" and node.target == "_guards_fn")


def is_identity(node: fx.Node) -> bool:
    """A cast, a slice or a detachment whose result is its input."""
    if node.target in CASTS:
        copies = node.kwargs.get("copy", False) or any(each is True for each in node.args[2:])
        if copies or any(isinstance(each, torch.memory_format) for each in (*node.args, *node.kwargs.values())):
            return False
        before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
        return bool(before.dtype == after.dtype and before.device == after.device and before.layout == after.layout)
    if node.target is aten.detach_.default:  # of a constant that the trace has just lifted: it has no history
        return node.args[0].target is aten.lift_fresh_copy.default  # type: ignore[union-attr]
    if node.target is aten.slice.Tensor:
        start, end = (*node.args[2:4], None, None)[:2]
        step = node.args[4] if len(node.args) > 4 else 1
        return bool((start, step, end) == (0, 1, sys.maxsize))
    return False


def _is_impure(node: fx.Node) -> bool:
    """Placeholders, the output, and operators that write to their arguments or draw random numbers stay."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)
