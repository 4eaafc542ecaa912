"""Which adapters the rows of a call have."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import starmap
from typing import Any
from weakref import WeakSet

import torch

from peftc.passes.plan.structure import TASK
from peftc.runtime.adapters.slots import Kept, Sources, Weighed, sources
from peftc.runtime.mixed_batch.groups import Arranged

_version = operator.attrgetter("_version")


@dataclass(frozen=True, eq=False)
class Chosen:
    """The adapters of a row, in order and with their weights.

    `kind` is one object for all that have the same structure when they are active alone. With a task it is one of
    several choices of the same adapters, `of`; `asked` has what graphs read of it.
    """

    weighed: Weighed
    kind: object
    of: "Chosen | None" = None
    asked: dict[str, torch.Tensor] = field(default_factory=dict)

    def at(self, task: int) -> "Chosen":
        """The same adapters for a task. Its number, an index, may be on the CPU wherever they are."""
        return Chosen(self.weighed, self.kind, self, {TASK: torch.tensor([task])})

    @property
    def task(self) -> torch.Tensor | None:
        """The number of the task, `[1]`, if it is for one."""
        return self.asked.get(TASK)

    @property
    def adapters(self) -> "Chosen":
        """The choice of the adapters alone, whose tensors it has."""
        return self.of or self

    @cached_property
    def sources(self) -> Sources:
        """Where everything is kept that slots would have of them."""
        return sources(self.weighed) if self.of is None else self.of.sources

    @cached_property
    def _kept(self) -> Sequence[Kept]:
        return [adapter.held(key) for adapter, _ in self.weighed for key, _ in adapter.items()]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor of theirs, as it is now. There are hundreds, and calls look at all."""
        return starmap(operator.getitem, self._kept)


@dataclass(frozen=True, eq=False)
class Seen:
    """The tensors of a choice when they were looked at, and how often each had been written to."""

    tensors: Sequence[torch.Tensor]
    versions: Sequence[int]


def looked(now: Sequence[torch.Tensor], before: Seen | None) -> Seen:
    """What was seen before, if tensors are what they were and unwritten since; else what is seen now."""
    try:
        versions = list(map(_version, now))
    except RuntimeError:  # one made in inference mode does not tell
        return Seen(now, [])
    if before is None or versions != before.versions or any(map(operator.is_not, now, before.tensors)):
        return Seen(now, versions)
    return before


AWAY = 16
"""Of how many choices, at least, that rows had before it is known what they were."""


@dataclass(frozen=True)
class Assigned:
    """What each row has. A module may be called with so many times as many rows as `repeats` has; then so many in a
    row have the same.
    """

    names: tuple[Chosen | None, ...] = ()
    repeats: frozenset[int] = frozenset()


class MixedBatch:
    """What the rows of a call have: each one of several choices that share a structure, or nothing.

    `layout` changes with the rows, `contents` with the tensors of any choice; both are compared by identity, and so is
    what `content` says of one choice.
    `room` are choices that are to fit in whatever is laid out, as a graph needs that a compiler has.
    """

    def __init__(self) -> None:
        self.room: tuple[Chosen, ...] = ()
        self._owned: dict[object, Mapping[str, str]] = {}
        self._assigned = Assigned()
        self.rows: tuple[Chosen | None, ...] = ()
        self.present: tuple[Chosen | None, ...] = ()
        self.layout, self.contents = object(), object()
        self._seen: dict[Chosen, Seen] = {}
        self._trains: bool | None = None
        self._arranged: dict[tuple[object, ...], Arranged] = {}
        self.laid_out: WeakSet[Any] = WeakSet()  # what keeps the tensors of all rows for a graph

    def forget(self, gone: Callable[[Chosen], bool]) -> None:
        """Let go of choices that there are no more."""
        if any(each is not None and gone(each) for each in (*self.rows, *self._assigned.names)):
            self.assigned = Assigned()
        self.room = tuple(each for each in self.room if not gone(each))
        self._seen = {each: seen for each, seen in self._seen.items() if not gone(each)}
        for each in list(self.laid_out):
            each.vacate(gone)

    def learn(self, owners: Mapping[object, Mapping[str, str]], room: Sequence[Chosen]) -> None:
        """Rows may have choices of these kinds too, which have these slots of the structure they share."""
        self._owned |= owners
        self.room = tuple(room)

    @property
    def assigned(self) -> Assigned:
        """What each row has."""
        return self._assigned

    @assigned.setter
    def assigned(self, assigned: Assigned) -> None:
        self._assigned = assigned
        self._give(assigned.names)

    def fits(self, count: int) -> bool:
        """Whether so many rows have something each, or can be given it."""
        names = self._assigned.names
        if count != len(self.rows) and names:
            times, left = divmod(count, len(names))
            if not left and times in self._assigned.repeats:
                self._give(tuple(each for each in names for _ in range(times)))
        return count == len(self.rows)

    @contextmanager
    def having(self, rows: tuple[Chosen | None, ...]) -> Iterator[None]:
        """Inside, rows have what they had in an earlier call."""
        before = self.rows
        self._give(rows)
        try:
            yield
        finally:
            self._give(before)

    def _give(self, rows: tuple[Chosen | None, ...]) -> None:
        if rows != self.rows:
            self.rows, self.layout, self._arranged = rows, object(), {}
            self.present, self._trains = tuple(dict.fromkeys(rows)), None

    def arranged(self, seats: tuple[object, ...]) -> Arranged:
        """Which of these seats, on which somebody of each choice sits, each row has."""
        if seats not in self._arranged:
            numbers = {each: seat for seat, each in enumerate(seats)}
            self._arranged[seats] = Arranged([numbers[each] for each in self.rows], len(seats))
        return self._arranged[seats]

    def look(self) -> None:
        """See whether a tensor of what the rows have was written to or replaced."""
        before, self._trains = self._seen, None
        seen = {each: looked(list(each.tensors()), before.get(each)) for each in self._adapters()}
        if any(before.get(each) is not now for each, now in seen.items()):
            self.contents = object()
        away = [each for each in before if each not in seen][-max(AWAY, len(seen)) :]  # may come back as they were
        self._seen = {**{each: before[each] for each in away}, **seen}

    def content(self, chosen: Chosen | None) -> object:
        """What is another object when the tensors of a choice are others, or were written to, when it was looked at."""
        return None if chosen is None else self._seen.get(chosen.adapters)

    @property
    def trains(self) -> bool:
        """Whether a gradient can reach what the rows have."""
        if self._trains is None:
            self._trains = any(tensor.requires_grad for each in self._adapters() for tensor in each.tensors())
        return self._trains

    def _adapters(self) -> dict[Chosen, None]:
        """The choices of the rows without their tasks, each once."""
        return dict.fromkeys(each.adapters for each in self.present if each is not None)

    def has(self, chosen: Chosen | None, slots: Iterable[str]) -> bool:
        """Whether a choice has all of these slots of the structure."""
        return chosen is not None and all(slot in self._owners(chosen) for slot in slots)

    def kept(self, chosen: Chosen, slot: str, name: str) -> Kept:
        """Where a choice keeps what a slot of the structure has under a name."""
        return (chosen.asked, name) if name in chosen.asked else chosen.sources[self._owners(chosen)[slot], name]

    def _owners(self, chosen: Chosen) -> Mapping[str, str]:
        return self._owned[chosen.kind]
