"""Operators whose value shares their operand's storage."""

import torch
from torch import fx

aten = torch.ops.aten

# These share their operand's storage.
VIEWS = frozenset(
    {
        *(aten.t.default, aten.transpose.int, aten.reshape.default, aten.view.default, aten.unsqueeze.default),
        *(aten.unflatten.int, aten.flatten.using_ints, aten.expand.default, aten.slice.Tensor, aten.select.int),
        *(aten.detach.default, aten.permute.default, aten.movedim.int),
    }
)


def is_view(node: fx.Node) -> bool:
    """Whether a node's value shares its operand's storage: computing it once saves nothing."""
    if node.target not in VIEWS:
        return False
    return share_storage(node.all_input_nodes[0].meta["val"], node.meta["val"])


def share_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two values are views of one storage."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
