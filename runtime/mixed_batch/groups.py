"""The rows of a call by the adapters that they have, for products that read the adapters' matrices as they lie."""

from collections import Counter
from collections.abc import Sequence
from enum import Enum

import torch

READ, LAID_OUT = 1.0, 3.0
"""What it takes to read a number of a matrix, and to lay one out by row and read it there."""

FILLED_UP = 0.25
"""And to multiply one with a token that only fills up."""


def is_cheaper(rows: Sequence[int], seats: int, tokens: int) -> bool:
    """Whether rows, by their seats, are better moved than given the matrices of these, in one call of so many tokens.

    All seats are multiplied with as many rows as the fullest has.
    """
    places = seats * max(Counter(rows).values())
    return seats * READ + (places - len(rows)) * tokens * FILLED_UP < len(rows) * LAID_OUT


class Way(Enum):
    """How graphs have the matrices of the rows."""

    LAID_OUT = 1  # by row
    GROUPED = 2  # as they lie, the rows moved
    BY_SEAT = 3  # as they lie, read by a kernel, which has no gradient


def way_of(rows: Sequence[int], seats: int, tokens: int, has_kernel: bool) -> Way:
    """What takes the least time in one call of so many tokens a row; `rows` are their seats."""
    if list(rows) == list(range(seats)):
        return Way.LAID_OUT  # they lie so
    if has_kernel:
        return Way.BY_SEAT
    return Way.GROUPED if is_cheaper(rows, seats, tokens) else Way.LAID_OUT


def given(way: Way, rows: Sequence[int], seats: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What graphs read of that as `GROUPS` and `PLACES`."""
    match way:
        case Way.LAID_OUT:
            nothing = torch.empty(0, dtype=torch.int64, device=device)
            return nothing, nothing
        case Way.BY_SEAT:
            return torch.tensor(0, device=device), torch.tensor(rows, device=device)
    return groups_of(rows, seats, device)


def groups_of(rows: Sequence[int], seats: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows sit on each seat, `[seats, most]`, filled up with any; and where in that, flat, each is: `[rows]`."""
    most = max(Counter(rows).values())
    groups, taken, places = [0] * (seats * most), [0] * seats, []
    for row, seat in enumerate(rows):
        place = seat * most + taken[seat]
        groups[place] = row
        taken[seat] += 1
        places.append(place)
    return torch.tensor(groups, device=device).view(seats, most), torch.tensor(places, device=device)
