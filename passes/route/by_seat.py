"""Which devices have a kernel for rows with matrices that lie by adapter."""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def multiplied_by_seat(x: Tensor, matrix: Tensor, seats: Tensor) -> Tensor:
    """`x` `[rows, n, in]` times `matrix[seats]`, of `[adapters, in, out]`."""
    kernel: Any = import_module("peftc.passes.route.seat_kernel")
    made: Tensor = kernel.product(x, matrix, seats)
    return made


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether a device has one that gives what it should: it is tried once, on small tensors of each type.

    Warns where Triton is there and fails.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    try:
        with torch.no_grad():
            return all(_is_right(device, dtype) for dtype in TYPES)
    except Exception as error:  # whatever Triton, its compiler or the driver say
        warnings.warn(
            f"Triton's kernel for rows with adapters of their own does not run on {device} and is left aside:"
            f" {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            stacklevel=2,
        )
        return False


def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, matrix = (torch.randn(size, generator=generator).to(device, dtype) for size in ((4, 3, 40), (3, 40, 24)))
    seats = torch.tensor([2, 0, 1, 2], device=device)
    wanted = torch.bmm(x, matrix[seats])
    return torch.allclose(multiplied_by_seat(x, matrix, seats), wanted, rtol=2e-2, atol=2e-2)
