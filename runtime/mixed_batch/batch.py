"""Which adapters the rows of a call have."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

from peftc.passes.plan.structure import Structure
from peftc.runtime.adapters.slots import Kept, Sources, Weighed, sources


@dataclass(frozen=True, eq=False)
class Chosen:
    """The adapters of a row, in order and with their weights, and their structure when they are active alone."""

    weighed: Weighed
    structure: Structure

    @cached_property
    def sources(self) -> Sources:
        """Where everything is kept that slots would have of them."""
        return sources(self.weighed)

    @cached_property
    def tensors(self) -> Sequence[Kept]:
        """Where every tensor of theirs is kept."""
        return [adapter.held(key) for adapter, _ in self.weighed for key, _ in adapter.items()]


@dataclass(frozen=True)
class Assigned:
    """What each row has. Where a call `stretches` it, so many rows in a row have the same as it takes."""

    names: tuple[Chosen | None, ...] = ()
    stretches: bool = False


class MixedBatch:
    """What the rows of a call have: each one of several choices that share a structure, or nothing.

    `layout` changes with the rows, `contents` with the tensors of what they have; both are compared by identity.
    `room` are choices that are to fit in whatever is laid out, as a graph needs that a compiler has.
    """

    def __init__(self) -> None:
        self.room: tuple[Chosen, ...] = ()
        self._owned: dict[Structure, Mapping[str, str]] = {}
        self._assigned = Assigned()
        self.rows: tuple[Chosen | None, ...] = ()
        self.present: tuple[Chosen | None, ...] = ()
        self.layout, self.contents = object(), object()
        self._seen: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._trains: bool | None = None

    def learn(self, owners: Mapping[Structure, Mapping[str, str]], room: Sequence[Chosen]) -> None:
        """Rows may have choices of these structures too, which have these slots of the structure they share."""
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
        if self._assigned.stretches and count and count != len(self.rows) and names and not count % len(names):
            self._give(tuple(each for each in names for _ in range(count // len(names))))
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
            self.rows, self.layout = rows, object()
            present = tuple(dict.fromkeys(rows))
            if set(present) != set(self.present):
                self._versions, self._trains = [], None
            self.present = present

    def look(self) -> None:
        """See whether a tensor of what the rows have was written to or replaced."""
        now = self._tensors()
        try:
            versions = [each._version for each in now]
        except RuntimeError:  # one made in inference mode does not tell
            versions = []
        same = bool(versions) and versions == self._versions
        if not same or any(map(operator.is_not, now, self._seen)):
            self.contents = object()
        self._seen, self._versions, self._trains = now, versions, None

    @property
    def trains(self) -> bool:
        """Whether a gradient can reach what the rows have."""
        if self._trains is None:
            self._trains = any(each.requires_grad for each in self._tensors())
        return self._trains

    def _tensors(self) -> list[torch.Tensor]:
        return [held[leaf] for each in self.present if each is not None for held, leaf in each.tensors]

    def has(self, chosen: Chosen | None, slots: Iterable[str]) -> bool:
        """Whether a choice has all of these slots of the structure."""
        return chosen is not None and all(slot in self._owners(chosen) for slot in slots)

    def kept(self, chosen: Chosen, slot: str, name: str) -> Kept:
        """Where a choice keeps what a slot of the structure has under a name."""
        return chosen.sources[self._owners(chosen)[slot], name]

    def _owners(self, chosen: Chosen) -> Mapping[str, str]:
        return self._owned[chosen.structure]
