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
    return _storage(node.all_input_nodes[0].meta["val"]) == _storage(node.meta["val"])


def _storage(value: torch.Tensor) -> int:
    return value.untyped_storage()._cdata
