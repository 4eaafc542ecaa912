"""The rows of a call by the adapters that they have, for products that read the adapters' matrices as they lie."""

from collections import Counter
from collections.abc import Sequence
from enum import Enum

import torch

READ, LAID_OUT = 1.0, 3.0
"""What it takes to read a number of a matrix, and to lay one out by row and read it there."""

MOVED, FILLED_UP = 1.0, 0.25
"""To move a number of an activation there and back, and to multiply one that only fills up with one of a matrix."""


class Way(Enum):
    """How graphs have the matrices of the rows."""

    LAID_OUT = 1  # by row
    GROUPED = 2  # as they lie, the rows moved
    BY_SEAT = 3  # as they lie, read by a kernel, which has no gradient


class Arranged:
    """On which seat each row is, `rows`, of how many; and what graphs read of that, once for all that seat alike."""

    def __init__(self, rows: Sequence[int], seats: int):
        self.rows, self.seats = rows, seats
        self.lies = list(rows) == list(range(seats))  # by row as it is
        self._fullest = max(Counter(rows).values(), default=0)
        self._made: dict[tuple[Way | None, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def way(self, tokens: int, rank: int, has_kernel: bool) -> Way:
        """What takes the least time in one call of so many tokens a row, for matrices of this smaller size."""
        if self.lies:
            return Way.LAID_OUT
        if has_kernel:
            return Way.BY_SEAT
        # All seats are multiplied with as many rows as the fullest has.
        rows, places = len(self.rows), self.seats * self._fullest
        moved = self.seats * rank * READ + rows * tokens * MOVED + (places - rows) * tokens * rank * FILLED_UP
        return Way.GROUPED if moved < rows * rank * LAID_OUT else Way.LAID_OUT

    def ids(self, device: torch.device) -> torch.Tensor:
        """`rows` as a tensor, int64."""
        key = (None, device)
        if key not in self._made:
            ids = torch.tensor(self.rows, device=device)
            self._made[key] = ids, ids
        return self._made[key][0]

    def given(self, way: Way, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """What graphs read as `GROUPS` and `PLACES`."""
        key = (way, device)
        if key not in self._made:
            match way:
                case Way.GROUPED:
                    self._made[key] = groups_of(self.rows, self.seats, device)
                case Way.BY_SEAT:
                    self._made[key] = torch.tensor(0, device=device), self.ids(device)
                case Way.LAID_OUT:
                    nothing = torch.empty(0, dtype=torch.int64, device=device)
                    self._made[key] = nothing, nothing
        return self._made[key]


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
