"""What a graph reads of the rows' adapters: computed for each adapter, laid out by row, kept while both stay."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.route.by_seat import TYPES, has_kernel
from peftc.passes.route.group_rows import GROUPS, PLACES
from peftc.passes.route.route_rows import IDS, LanePieces, Piece
from peftc.runtime.adapters.room import empty, largest, padded
from peftc.runtime.adapters.slots import Kept
from peftc.runtime.mixed_batch.batch import Chosen, MixedBatch, Seen, looked
from peftc.runtime.mixed_batch.groups import Arranged, Way

Tensors = tuple[torch.Tensor, ...]
Compute = Callable[[Chosen | None], Tensors]
"""What a lane's prologue gives for the tensors of a choice."""

Draw = Callable[[Chosen, torch.Tensor], Tensors]
"""The same for the tensors of a choice and each of several tasks, `[rows, 1]`; numbers are drawn for every row."""


@dataclass
class Lane:
    """What some rows have together in one module: its pieces, and what computes them for a choice.

    `slots` are those of the whole model. `everyone` has it where what a choice has not is the base's.
    """

    lane: LanePieces
    slots: frozenset[str]
    compute: Compute
    everyone: bool
    base: Sequence[Kept] = ()  # where the base's tensors are kept that it is computed from
    drawing: Draw | None = None  # where numbers are drawn for each row
    room: Tensors | None = None  # for each value zeros, as large as the largest that are to fit

    def of(self, seats: Mapping[int, Chosen | None]) -> dict[int, Tensors]:
        """What these have. Where numbers are drawn, all rows of an adapter have theirs of one draw, as in PEFT."""
        if self.drawing is None:
            return {seat: self.compute(each) for seat, each in seats.items()}
        found: dict[int, Tensors] = {}
        alike: dict[Chosen, list[int]] = {}
        for seat, each in seats.items():
            if each is None or each.task is None:
                found[seat] = self.compute(each)
            else:
                alike.setdefault(each.adapters, []).append(seat)
        for adapters, own in alike.items():
            tasks = torch.stack([seats[seat].task for seat in own])  # type: ignore[union-attr, misc]
            drawn = self.drawing(adapters, tasks)
            found |= dict(zip(own, zip(*(each.unbind() for each in drawn), strict=True), strict=True))
        return found

    def made_room(self, choices: Sequence[Chosen]) -> Tensors:
        """Zeros that are as large as the values of any of these choices."""
        if self.room is None:
            made = [self.compute(each) for each in choices]
            self.room = tuple(each[0].new_zeros(largest(each)) for each in zip(*made, strict=True))
        return self.room


FREE = object()
"""What sits where nobody does."""

Seats = tuple[object, ...]
"""Who has which place in what is laid out: choices, None for rows without an adapter, or `FREE`."""


STAYS = 2
"""In how many calls rows have what they have before matrices are laid out by row for what follows."""

FEW = 8
"""Up to how many tokens a row a product is the time to read its matrices, which is least along their longer axis."""


class RowPieces:
    """The pieces of one program, refreshed before it runs.

    The values of all choices that rows have are kept side by side, in *seats*; a choice that leaves gives its seat to
    one that comes. What graphs read is chosen from these, once for as long as the rows have what they have; until it is
    known that they will have it for a while, those of `grouped` are read as they lie, where that takes less time. Where
    numbers are drawn for each row, every row has a seat of its own, in every call anew.
    """

    def __init__(
        self, batch: MixedBatch, lanes: Sequence[Lane], near: nn.Module, grouped: frozenset[str] = frozenset()
    ):
        self._batch, self._lanes, self._near, self._may_group = batch, lanes, near, grouped
        self.values: dict[str, torch.Tensor] = {}
        self._tokens = 1  # of each row in a call
        self._calls = 0  # in which the rows had what they have now
        self._at = Arranged((), 0)  # on which seats the rows are
        self._way = Way.LAID_OUT
        self._wide = False  # whether matrices are as products of many tokens have them best
        self._otherwise = 0  # calls in a row that would have had them the other way
        self._layout: object = None
        self._contents: object = None
        self._seats: Seats = ()
        self._laid: Sequence[object] = ()  # whose values each row of what graphs read has; of none where that is shared
        self._seen: dict[Any, object] = {}  # what each that sits had when its values were computed
        self._sitting: dict[str, torch.Tensor] = {}  # of each piece the values of all seats
        self._lent = False  # whether a backward pass may read what there is
        self._tables = {piece.name for lane in lanes for piece in lane.lane.pieces if piece.form == "tables"}
        self._draws = any(each.lane.draws for each in lanes)
        self._base = list({(id(held), leaf): (held, leaf) for lane in lanes for held, leaf in lane.base}.values())
        self._base_seen: Seen | None = None
        batch.laid_out.add(self)

    @property
    def _device(self) -> torch.device:
        return next(self._near.parameters()).device

    def vacate(self, gone: Callable[[Chosen], bool]) -> None:
        """Let go of choices that there are no more."""
        self._seats = tuple(FREE if isinstance(each, Chosen) and gone(each) else each for each in self._seats)
        self._seen = {each: seen for each, seen in self._seen.items() if each is None or not gone(each)}
        if any(isinstance(each, Chosen) and gone(each) for each in self._laid):
            self._laid = ()

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise UsageError unless the first of these tensors has as many rows as there are choices."""
        wide = [each for each in tensors if each.is_floating_point() and each.dim() > 1]
        first = next(iter(wide or [each for each in tensors if each.dim()]), None)
        found = 0 if first is None else first.shape[0]
        if first is not None:
            self._tokens = math.prod(first.shape[1:-1] if wide else first.shape[1:])
        if not self._batch.fits(found):
            rows = len(self._batch.rows)
            message = f"{rows} rows have adapters of their own, and a module with adapters is called with {found}"
            help = "let the first axis of what it is given be the rows, or choose other sites"
            fail(UsageError, "E529", message, help=help)

    def refresh(self) -> None:
        """Lay out the pieces anew unless the rows have what they had, unwritten since."""
        batch, graded = self._batch, torch.is_grad_enabled()
        base = [held[leaf] for held, leaf in self._base]
        if self._draws or (graded and (batch.trains or any(each.requires_grad for each in base))):
            self._seats = ()
            self._lay_out(graded)
            self._seats, self._layout = (), None  # a graph is for one backward pass
            return
        if base and self._base_seen is not (seen := looked(base, self._base_seen)):
            self._base_seen, self._seats, self._layout = seen, (), None
        if self._layout is not batch.layout or self._contents is not batch.contents:
            with torch.inference_mode(False), torch.no_grad():
                self._lay_out(graded)
            self._layout, self._contents = batch.layout, batch.contents
            self._calls = 0
        elif self._may_group:
            self._reconsider(graded)
        self._calls += 1
        self._lent = self._lent or graded

    def _reconsider(self, graded: bool) -> None:
        """Have matrices in another way, where rows stay or calls have other numbers of tokens."""
        way, wide = self._way, self._tokens > FEW
        if graded and way is not Way.BY_SEAT:
            return  # what a backward pass runs again is to keep the same tensors for it
        self._otherwise = self._otherwise + 1 if wide is not self._wide else 0
        if way is not Way.LAID_OUT:
            way = Way.LAID_OUT if self._calls >= STAYS else self._quickest(graded)
        if way is not self._way or (way is Way.LAID_OUT and self._otherwise > STAYS):
            with torch.inference_mode(False), torch.no_grad():
                self._choose(way, wide)

    def _quickest(self, graded: bool) -> Way:
        """How graphs are best given matrices that they may read as they lie."""
        if self._draws or not self._may_group or self._at.lies:
            return Way.LAID_OUT
        matrices = [self._sitting[name] for name in self._may_group]
        kernel = not graded and has_kernel(matrices[0].device) and all(each.dtype in TYPES for each in matrices)
        return self._at.way(self._tokens, max(min(each.shape[1:]) for each in matrices), kernel)

    def _lay_out(self, graded: bool) -> None:
        batch, before = self._batch, self._seats
        self._seats, self._layout = (), None  # until all is done
        seats = tuple(batch.rows) if self._draws else _seated(before, batch.present)
        seen: dict[Any, object] = {each: batch.content(each) for each in batch.present}
        away = {each: self._seen[each] for each in seats if each in self._seen and each not in seen}
        stays = {each for each in batch.present if each in before and self._seen.get(each) is seen[each]}
        fresh = [seat for seat, each in enumerate(seats) if each in seen and each not in stays]
        made = False
        for lane in self._lanes:
            if len(seats) != len(before) or (fresh and not self._written(lane, seats, fresh)):
                self._made(lane, seats)
                made = True
        self._at = Arranged(range(len(seats)), len(seats)) if self._draws else batch.arranged(seats)
        way = self._quickest(graded)
        stay = way is Way.LAID_OUT and not (made or self._lent or self._draws)
        changed = self._changed(stays) if stay else None
        self._laid = ()
        if changed is None:
            self._choose(way)
        else:
            self._exchange(changed)
        self._seats, self._seen, self._lent = seats, {**away, **seen}, False

    def _changed(self, stays: Collection[Chosen | None]) -> Sequence[int] | None:
        """Which rows have something else than was laid out; None where that is shared or most have."""
        rows, laid = self._batch.rows, self._laid
        if len(laid) != len(rows):
            return None
        changed = [row for row, each in enumerate(rows) if each not in stays or each is not laid[row]]
        return changed if len(changed) <= len(rows) // 2 else None

    def _exchange(self, changed: Sequence[int]) -> None:
        """Let some rows of what graphs read have what their seats have; the others have it."""
        self.values[IDS] = self._at.ids(self._device)
        if changed:
            places = torch.tensor(changed, device=self._device)
            ids = self.values[IDS][places]
            for name, value in self._sitting.items():
                if name not in self._tables:
                    self.values[name].index_copy_(0, places, value.index_select(0, ids))
        self._laid = self._batch.rows

    def _choose(self, way: Way, wide: bool = False) -> None:
        """Let graphs read what the seats of the rows have: by row, or what they may so as it lies."""
        device = self._device
        ids = self._at.ids(device)
        self._way, self._wide, self._otherwise = way, wide and way is Way.LAID_OUT, 0
        as_it_lies = self._tables if way is Way.LAID_OUT else self._tables | self._may_group
        for name, value in self._sitting.items():
            as_it_is = self._at.lies or name in as_it_lies
            made = value if as_it_is else _picked(value, ids, self._wide)
            self.values[name] = made.contiguous() if self._wide and name in self._may_group else made
        self.values[IDS] = ids
        if self._may_group:
            self.values[GROUPS], self.values[PLACES] = self._at.given(way, device)
        self._laid = () if self._at.lies or way is not Way.LAID_OUT else self._batch.rows

    def _made(self, lane: Lane, seats: Seats) -> None:
        """Compute a lane for all seats."""
        own = lane.of({seat: each for seat, each in enumerate(seats) if self._has(lane, each)})  # type: ignore[misc]
        room = [each for each in self._batch.room if self._batch.has(each, lane.slots)]
        for piece in lane.lane.pieces:
            values = {seat: made[piece.index].to(piece.dtype) for seat, made in own.items()}
            made = [*values.values(), *([lane.made_room(room)[piece.index]] if room else [])]
            filler = made[0].detach() if lane.lane.guarded else torch.full_like(made[0], empty(piece.dtype))
            sizes = largest(made)
            alike = [padded(values.get(seat, filler), sizes) for seat in range(len(seats))]
            turned = [_turned(piece, each) for each in alike]
            self._sitting[piece.name] = _stacked(turned) if piece.name in self._may_group else torch.stack(turned)
        for name in lane.lane.members:
            self._sitting[name] = torch.tensor([seat in own for seat in range(len(seats))], device=self._device)

    def _written(self, lane: Lane, seats: Seats, fresh: Sequence[int]) -> bool:
        """Compute a lane for some of the seats, where what these have fits. Returns whether it does."""
        own = {seat: lane.compute(seats[seat]) for seat in fresh if self._has(lane, seats[seat])}  # type: ignore[arg-type]
        found: list[tuple[Piece, dict[int, torch.Tensor]]] = []
        for piece in lane.lane.pieces:
            values = {seat: _turned(piece, made[piece.index]) for seat, made in own.items()}
            room = self._sitting[piece.name].shape[1:]
            if any(size > most for each in values.values() for size, most in zip(each.shape, room, strict=True)):
                return False
            found.append((piece, values))
        for name in (*(piece.name for piece in lane.lane.pieces), *lane.lane.members):
            if self._lent:
                self._sitting[name] = self._sitting[name].clone()
        for piece, values in found:
            sitting = self._sitting[piece.name]
            for seat in fresh:
                if seat in values or not lane.lane.guarded:  # what nobody looks at may stay
                    sitting[seat].fill_(empty(piece.dtype))
                if seat in values:
                    sitting[seat][tuple(map(slice, values[seat].shape))] = values[seat]
        for name in lane.lane.members:
            for seat in fresh:
                self._sitting[name][seat] = seat in own
        return True

    def _has(self, lane: Lane, seated: Any) -> bool:
        return seated is not FREE and (lane.everyone or self._batch.has(seated, lane.slots))


def _seated(before: Seats, present: Sequence[Chosen | None]) -> Seats:
    """Who has which seat now: as before, those who come where nobody sits or who is not here; all anew where these are
    too few. Who is not here keeps the seat until then.
    """
    coming = [each for each in present if each not in before]
    free = [seat for seat, each in enumerate(before) if each is FREE or each not in present]
    if len(free) < len(coming):
        return tuple(present)
    free.sort(key=lambda seat: before[seat] is not FREE)
    seats = list(before)
    for seat, each in zip(free, coming, strict=False):
        seats[seat] = each
    return tuple(seats)


def _turned(piece: Piece, value: torch.Tensor) -> torch.Tensor:
    return value.transpose(-1, -2) if piece.form == "matrix" else value


def _stacked(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Matrices `[in, out]` one after the other, each one's longer axis the one along which it lies in memory."""
    rows, columns = values[0].shape
    return torch.stack(list(values)) if rows <= columns else torch.stack([each.mT for each in values]).mT


def _picked(value: torch.Tensor, ids: torch.Tensor, turn: bool) -> torch.Tensor:
    """What these seats have, each along the axis along which it lies; or `turn`, along the last."""
    if value.dim() == 3 and not value.is_contiguous() and value.mT.is_contiguous():
        return value.index_select(0, ids) if turn else _picked(value.mT, ids, turn).mT
    if value.dim() < 2 or value.requires_grad or not value.is_floating_point() or not value.is_contiguous():
        return value.index_select(0, ids)
    return torch.embedding(value.flatten(1), ids).view(len(ids), *value.shape[1:])  # the same, and half the time
