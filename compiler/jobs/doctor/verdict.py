"""How a check says that something is wrong."""

import torch

TOLERANCE = 1e-4  # of the largest value: tiny models in float32


class CheckFailedError(Exception):
    """What was computed is not what it should be."""


def agree(left: torch.Tensor, right: torch.Tensor, what: str, *, exactly: bool = False) -> float:
    """The largest difference, relative to the largest value. Raises CheckFailedError where that is too much."""
    if left.shape != right.shape:
        raise CheckFailedError(f"{what}: shapes {tuple(left.shape)} and {tuple(right.shape)}")
    left, right = left.detach().double().cpu(), right.detach().double().cpu()
    difference = float((left - right).abs().max() / right.abs().max())
    if not difference <= (0 if exactly else TOLERANCE):  # nan is no agreement
        raise CheckFailedError(f"{what} differ by {difference:.2g} of the largest value")
    return difference


def differ(left: torch.Tensor, right: torch.Tensor, what: str) -> None:
    """Raises CheckFailedError where two tensors are nearly the same: a check that compares them would tell nothing."""
    largest = float((left.detach() - right.detach()).abs().max() / right.detach().abs().max())
    if not largest > 10 * TOLERANCE:
        raise CheckFailedError(f"{what} are the same, and should not be")
