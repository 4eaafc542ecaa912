"""Whether outputs and gradients are the same within rounding."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache

NEAR = 1e-4  # of the largest number
NEAR_GRADIENT = 5e-4


def tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of an output, without caches."""
    if isinstance(output, torch.Tensor):
        yield from [output] if output.is_floating_point() else []
    elif isinstance(output, dict) or hasattr(output, "items"):
        for each in output.values():
            yield from tensors(each)
    elif isinstance(output, list | tuple):
        for each in output:
            yield from tensors(each)
    elif hasattr(output, "__dataclass_fields__") and not isinstance(output, Cache):
        for name in output.__dataclass_fields__:
            yield from tensors(getattr(output, name))


def differences(mine: list[torch.Tensor], theirs: list[torch.Tensor], near: float = NEAR) -> str:
    """How far apart two outputs are; empty where they are equal within rounding."""
    if [each.shape for each in mine] != [each.shape for each in theirs]:
        return f"{len(mine)} outputs for {len(theirs)}, or of other sizes"
    for at, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        one, other = one.detach().float(), other.detach().float()
        if not torch.equal(torch.isfinite(one), torch.isfinite(other)):
            return f"output {at} is finite elsewhere"
        one, other = (torch.nan_to_num(each, 0.0, 0.0, 0.0) for each in (one, other))
        far, large = (
            float((one - other).abs().max() if one.numel() else 0.0),
            float(other.abs().max() if other.numel() else 0.0),
        )
        if far > near * max(large, 1e-6):
            return f"output {at} is {far / max(large, 1e-6):.1e} off"
    return ""


def gradients_apart(mine: dict[str, Any], want: dict[str, Any]) -> str:
    """Where gradients are not the same; one that is none is one of zeros."""
    if {*mine} != {*want}:
        return f"names differ: {sorted({*mine} ^ {*want})[:2]}"
    largest = max((float(each.abs().max()) for each in want.values() if each is not None), default=0.0)
    far = {}
    for key, its in want.items():
        own = mine[key]
        if own is None and its is None:
            continue
        one = torch.zeros_like(its) if own is None else own
        other = torch.zeros_like(one) if its is None else its
        apart = float((one - other.view_as(one)).abs().max())
        if not apart <= NEAR_GRADIENT * float(other.abs().max()) + 1e-5 * largest:
            far[key] = apart / max(float(other.abs().max()), 1e-12)
    worst = max(far, key=lambda each: far[each], default="")
    return f"{len(far)} of {len(want)} differ, {worst} by {far[worst]:.1e}" if far else ""
