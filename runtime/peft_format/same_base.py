"""Whether a tensor in a file is the base's own, in whichever of the two types has fewer digits."""

import torch
from torch import Tensor


def narrowed(own: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """A file's tensor and the base's, on the CPU, both as the type with fewer digits has them."""
    kind = min(own.dtype, base.dtype, key=lambda each: each.itemsize)
    return own.to(kind).cpu(), base.detach().to(kind).cpu()


def is_same(own: Tensor, base: Tensor) -> bool:
    """Whether a file's tensor is the base's, but for what rounding took away of one of them.

    Not where the base's is not in memory: then nobody knows.
    """
    return own.shape == base.shape and not base.is_meta and torch.equal(*narrowed(own, base))
