"""What a graph reads of the rows' adapters: computed for each adapter, laid out by row, kept while both stay."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import pad

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.route.route_rows import IDS, LanePieces, Piece
from peftc.runtime.mixed_batch.batch import Chosen, MixedBatch

Tensors = tuple[torch.Tensor, ...]
Compute = Callable[[Chosen | None], Tensors]
"""What a lane's prologue gives for the tensors of a choice."""


@dataclass
class Lane:
    """What some rows have together in one module: its pieces, and what computes them for a choice.

    `slots` are those of the whole model. `everyone` has it where what a choice has not is the base's.
    """

    lane: LanePieces
    slots: frozenset[str]
    compute: Compute
    everyone: bool
    known: dict[Chosen | None, Tensors] = field(default_factory=dict)
    room: Tensors | None = None  # for each value zeros, as large as the largest that are to fit

    def of(self, chosen: Chosen | None) -> Tensors:
        """The values of a choice that has the lane."""
        if chosen not in self.known:
            self.known[chosen] = self.compute(chosen)
        return self.known[chosen]

    def made_room(self, choices: Sequence[Chosen]) -> Tensors:
        """Zeros that are as large as the values of any of these choices."""
        if self.room is None:
            made = [self.compute(each) for each in choices]
            self.room = tuple(
                each[0].new_zeros([max(sizes) for sizes in zip(*(value.shape for value in each), strict=True)])
                for each in zip(*made, strict=True)
            )
        return self.room


class RowPieces:
    """The pieces of one program, refreshed before it runs."""

    def __init__(self, batch: MixedBatch, lanes: Sequence[Lane], near: nn.Module):
        self._batch, self._lanes, self._near = batch, lanes, near
        self.values: dict[str, torch.Tensor] = {}
        self._layout: object = None
        self._contents: object = None

    @property
    def _device(self) -> torch.device:
        return next(self._near.parameters()).device

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise UsageError unless the first of these tensors has as many rows as there are choices."""
        wide = [each for each in tensors if each.is_floating_point() and each.dim() > 1]
        first = next(iter(wide or [each for each in tensors if each.dim()]), None)
        found = 0 if first is None else first.shape[0]
        if not self._batch.fits(found):
            rows = len(self._batch.rows)
            message = f"{rows} rows have adapters of their own, and a module with adapters is called with {found}"
            help = "let the first axis of what it is given be the rows, or choose other sites"
            fail(UsageError, "E529", message, help=help)

    def refresh(self) -> None:
        """Lay out the pieces anew unless the rows have what they had, unwritten since."""
        batch = self._batch
        trains = torch.is_grad_enabled() and batch.trains
        if not trains and self._layout is batch.layout and self._contents is batch.contents:
            return
        if trains:
            self._renew(None)
            self._layout = None
            return
        with torch.inference_mode(False), torch.no_grad():
            self._renew(batch.contents)
        self._layout = batch.layout

    def _renew(self, contents: object) -> None:
        same = contents is not None and contents is self._contents
        for each in self._lanes:
            if not same:
                each.known.clear()
            each.known = {chosen: value for chosen, value in each.known.items() if chosen in self._batch.present}
            self._lay_out(each)
        numbers = {chosen: number for number, chosen in enumerate(self._batch.present)}
        self.values[IDS] = torch.tensor([numbers[each] for each in self._batch.rows], device=self._device)
        self._contents = contents

    def _lay_out(self, lane: Lane) -> None:
        batch = self._batch
        own = {each: lane.of(each) for each in batch.present if lane.everyone or batch.has(each, lane.slots)}
        room = lane.made_room([each for each in batch.room if batch.has(each, lane.slots)]) if batch.room else ()
        for piece in lane.lane.pieces:
            values = {chosen: made[piece.index] for chosen, made in own.items()}
            largest = [*values.values(), *room[piece.index : piece.index + 1]]
            sizes = [max(each) for each in zip(*(value.shape for value in largest), strict=True)]
            filler = largest[0].detach() if lane.lane.guarded else torch.full_like(largest[0], _empty(piece.dtype))
            found = {each: _padded(values.get(each, filler).to(piece.dtype), sizes) for each in batch.present}
            self.values[piece.name] = _laid_out(piece, found, batch.rows)
        for name in lane.lane.members:
            self.values[name] = torch.tensor([each in own for each in batch.rows], device=self._device)


Values = dict[Chosen | None, torch.Tensor]


def _padded(value: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """A value of this size: a smaller one ends in zeros, which change no product, or in tokens that there are not."""
    missing = [size - own for own, size in zip(value.shape, sizes, strict=True)]
    if not any(missing):
        return value
    if value.is_floating_point():
        return pad(value, [each for size in reversed(missing) for each in (0, size)])
    padded = value.new_full(tuple(sizes), _empty(value.dtype))
    padded[tuple(slice(size) for size in value.shape)] = value
    return padded


def _empty(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).max if dtype in (torch.int32, torch.int64) else 0


def _laid_out(piece: Piece, values: Values, rows: Sequence[Chosen | None]) -> torch.Tensor:
    if piece.form == "tables":
        return torch.stack(list(values.values()))
    if piece.form == "matrix":
        values = {chosen: value.transpose(-1, -2) for chosen, value in values.items()}
    return torch.stack([values[each] for each in rows])
