"""Calls whose rows have adapters of their own: names become choices, choices what regions are served with."""

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import nn

from peftc.grammar.diagnostics import UsageError, fail
from peftc.grammar.spec.spec import Regions
from peftc.passes.foreign.peft import BASE_ROWS, BY_ROW, TASK_IDS
from peftc.passes.plan.by_row import ByRow, by_row
from peftc.passes.plan.structure import structure_of
from peftc.runtime.adapted.base_weights import Active
from peftc.runtime.adapted.row_names import Row, named, rows_with, with_tasks
from peftc.runtime.adapted.row_slots import slot_values
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.execution.engine import ActiveAdapters, Engine, Specialisation
from peftc.runtime.mixed_batch.batch import Assigned, Chosen, MixedBatch
from peftc.runtime.regions.host import Host
from peftc.runtime.regions.modules import become_regions
from peftc.runtime.regions.places import DEFAULT
from peftc.runtime.regions.within import is_within


class Adapters(Protocol):
    """What choices are made of."""

    engine: Engine
    host: Host
    enabled: bool
    active: Active
    regions: Regions

    def adapter(self, name: str) -> AdapterParameters:
        """The adapter of that name. Raises UsageError."""
        ...

    def names(self) -> tuple[str, ...]:
        """All adapters, in the order they were added."""
        ...

    def check(self, active: Active) -> None:
        """Raise UsageError where these adapters cannot be active together."""
        ...

    @property
    def displaced(self) -> Any:
        """What is merged has the place of these."""
        ...

    @property
    def tasks(self) -> int:
        """How many tasks the weights of the active adapters are for."""
        ...

    def tenant(self, active: Active) -> ActiveAdapters:
        """What calls are served with while these are active."""
        ...


KEPT = 8
"""For how many batches that differ in more than who has which row a thread keeps what was laid out."""


@dataclass(frozen=True)
class Before:
    """What a thread's calls were served with before the rows of one got adapters of their own."""

    names: tuple[Row, ...] | None
    repeats: frozenset[int]
    tenant: ActiveAdapters | None
    assigned: Assigned | None
    locked: bool


class _Now(threading.local):
    """What the rows of a thread's calls have, and what was laid out for that. A compiler reads whether they have."""

    def __init__(self) -> None:
        self.is_on = False
        self.names: tuple[Row, ...] | None = None
        self.repeats: frozenset[int] = frozenset()
        self.looked: set[ActiveAdapters] = set()
        self.known: dict[tuple[Specialisation, int], ActiveAdapters] = {}
        self.generation = 0


class RowAdapters:
    """The choices of a model's calls by row, and what calls are served with that have them."""

    def __init__(self, state: Adapters):
        self._state = state
        self._chosen: dict[Row, Chosen] = {}
        self._order: dict[Specialisation, None] = {}  # the kinds that there were, as they came
        self._shared: dict[tuple[Specialisation, ...], tuple[ByRow, Specialisation]] = {}
        self._compiled: dict[Specialisation, ActiveAdapters] = {}  # of which there is one, as of the slots
        self._batches: WeakSet[MixedBatch] = WeakSet()  # of all threads
        self._lock = threading.RLock()  # around calls of a compiler's graphs
        self._now = _Now()
        self._generation = 0  # of what is kept for threads
        state.host.adopt = self._adopt

    def clear(self) -> None:
        """Forget every choice: adapters were removed, moved or replaced."""
        self._chosen.clear()
        self._generation += 1

    def forget(self, names: Collection[str]) -> None:
        """These adapters are no more: what was made for other rows stays."""
        for row in [each for each in self._chosen if any(name in names for name, _ in each.active)]:
            del self._chosen[row]
        for batch in list(self._batches):
            batch.forget(lambda chosen: any(adapter.plan.name in names for adapter, _ in chosen.weighed))

    @property
    def is_on(self) -> bool:
        """Whether the rows of calls have adapters of their own, in this thread and now."""
        return self._now.is_on

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def tasks_in(self, arguments: dict[str, Any], names: Any) -> Any:
        """Take out of a call's arguments the tasks that are for rows, if any: where rows have names, or what is active
        has weights by task. While adapters rest they mean nothing, as in PEFT.
        """
        if TASK_IDS not in arguments or (names is None and not self._state.tasks):
            return None
        tasks = arguments.pop(TASK_IDS)
        return tasks if names is not None or self._state.enabled else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(
        self,
        names: Any,
        count: int | None,
        *,
        compiling: bool,
        repeats: frozenset[int] = frozenset(),
        tasks: Any = None,
    ) -> Before:
        """From now on, and in this thread, the rows of calls have these adapters, each its own, and these tasks.

        Without names all have what is active; with neither it goes on as before. `repeats` are how many times as many
        rows generation will call the model with, or an encoder by itself: so many in a row have the same. With
        `compiling` other names are to need no other graph. Raises UsageError, and changes nothing: an unknown name or
        task, or a number of rows that the names or tasks do not fit.
        """
        compiling = compiling or self._state.host.compiled
        goes_on = names is None and tasks is None
        own = self._now.names if goes_on else self.read(names, tasks, count)
        assert own is not None
        times, left = (1, 0) if count is None else divmod(count, len(own) or 1)
        if left or not own or times not in {1} | (self._now.repeats if goes_on else frozenset()):
            message = f"'{BY_ROW}' has {len(own)} names, and the call {count or 'no'} rows"
            fail(UsageError, "E529", message, help=f"give one name for each row, {BASE_ROWS!r} for none")
        tenant, rows = self._tenant(own, times, compiling=compiling)
        if compiling:
            self._lock.acquire()
        pinned = self._state.host.pin(tenant)
        mixed = None if pinned is None else pinned.mixed
        assigned = None if mixed is None else mixed.assigned
        before = Before(self._now.names, self._now.repeats, pinned, assigned, compiling)
        try:
            if not goes_on:
                self._now.repeats = repeats
            self._serve(own, tenant, Assigned(rows, repeats), looked=goes_on)
        except BaseException:
            self.leave(before)
            raise
        return before

    def _serve(self, names: tuple[Row, ...], tenant: ActiveAdapters, assigned: Assigned, *, looked: bool) -> None:
        if not looked:
            self._now.looked = set()
        if tenant.mixed is not None:
            tenant.mixed.assigned = assigned
            if tenant not in self._now.looked:  # in generation, once
                tenant.mixed.look()
                self._now.looked.add(tenant)
        self._now.names, self._now.is_on = names, True
        self._state.host.enter(tenant.specialisation)
        self._state.host.refresh_rows(tenant)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(self, before: Before) -> None:
        """Go on as before."""
        self._now.names, self._now.is_on, self._now.repeats = before.names, before.names is not None, before.repeats
        self._state.host.pin(before.tenant)
        if before.assigned is not None:
            assert before.tenant is not None
            assert before.tenant.mixed is not None
            before.tenant.mixed.assigned = before.assigned
        self._state.host.enter(None if before.tenant is None else before.tenant.specialisation)
        if before.locked:
            self._lock.release()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def check_within(self, names: Any, tasks: Any, count: int | None, modules: Sequence[str]) -> None:
        """Raise UsageError where an adapter has a place outside of these modules, which alone compute with the rows."""
        told = TASK_IDS if names is None else BY_ROW
        for name, _ in dict.fromkeys(one for row in self.read(names, tasks, count) for one in row.active):
            places = (at.site.module for at in self._state.adapter(name).plan.sites)
            for place in places:
                if not any(is_within(place, module) for module in modules):
                    message = f"'{told}' cannot be given: adapter {name!r} adapts {place}, whose rows are images"
                    fail(UsageError, "E528", message, help="call once for each adapter, or choose sites of the text")

    def read(self, names: Any, tasks: Any, count: int | None) -> tuple[Row, ...]:
        """What the rows of a call have by its `adapter_names` and `task_ids`; without names, what is active.

        Raises UsageError, and changes nothing.
        """
        if names is None:
            found: tuple[Active, ...] = (self._state.active,)
        else:
            found = named(names, self._state.names())
        if self._state.displaced or not self._state.enabled:
            told = TASK_IDS if names is None else BY_ROW
            why = "adapters are merged" if self._state.displaced else "the adapters are disabled"
            help = "call unmerge_adapter first" if self._state.displaced else "call enable_adapters first"
            fail(UsageError, "E528", f"'{told}' cannot be given: {why}", help=help)
        told = TASK_IDS if names is None else BY_ROW
        counts = {active: self._tasks(active, told) for active in dict.fromkeys(found)}
        if names is None:
            found *= rows_with(tasks, count)
        return with_tasks(found, counts, tasks)

    def _tasks(self, active: Active, told: str) -> int:
        """How many tasks there are for rows with these adapters. Raises UsageError where rows cannot have them."""
        if not active:
            return 0
        return self._adapters(active, told).structure.tasks

    def _adapters(self, active: Active, told: str = BY_ROW) -> Specialisation:
        """The kind of these adapters. Raises UsageError, telling which argument asks, where rows cannot have them."""
        if (row := Row(active)) not in self._chosen:
            self._state.check(active)
            adapters = [self._state.adapter(name) for name, _ in active]
            weights = [weight for _, weight in active]
            structure = structure_of([(each.plan, each.dtypes()) for each in adapters], weights)
            if structure.fronts:
                front = next(each.plan.name for each in adapters if not self._is_weight(each.plan.name))
                message = f"'{told}' cannot be given: adapter {front!r} puts virtual tokens in front"
                fail(UsageError, "E528", message, help="call once for each adapter that is no weight")
            kind = self._state.engine.specialisation(structure)
            self._order.setdefault(kind)
            self._chosen[row] = Chosen(list(zip(adapters, weights, strict=True)), kind)
        found = self._chosen[row].kind
        assert isinstance(found, Specialisation)
        return found

    def _choice(self, row: Row) -> Chosen:
        if row not in self._chosen:
            self._adapters(row.active)
            if row.task is not None:
                self._chosen[row] = self._chosen[Row(row.active)].at(row.task)
        return self._chosen[row]

    def _tenant(
        self, names: tuple[Row, ...], times: int, *, compiling: bool
    ) -> tuple[ActiveAdapters, tuple[Chosen | None, ...]]:
        """What calls are served with whose rows have these, so many times each, and what the rows have."""
        kinds = dict.fromkeys(names)
        alike = names[0].active if len(kinds) == 1 and names[0].task is None and not compiling else None
        if alike is not None:
            return self._state.tenant(alike) if alike else self._state.engine.plain, ()
        chosen = {row: self._choice(row) if row.active else None for row in kinds}
        rows = tuple(chosen[each] for each in names for _ in range(times))
        adapted = [each for each in chosen.values() if each is not None]
        return self._sharing(adapted, len(rows), compiling=compiling), rows

    def _sharing(self, chosen: Sequence[Chosen], rows: int, *, compiling: bool) -> ActiveAdapters:
        """What serves calls of so many rows that have choices of these structures."""
        if compiling:
            names = [name for name in self._state.names() if self._is_weight(name)]
            alone = [Row(((name, 1.0),)) for name in names]
            more = [each._replace(task=0) if self._tasks(each.active, BY_ROW) else each for each in alone]
            chosen = list(dict.fromkeys([*chosen, *map(self._choice, more)]))
        own = {each.kind: each for each in chosen}
        kinds = tuple(kind for kind in self._order if kind in own)
        if kinds not in self._shared:
            made = by_row([each.structure for each in kinds])
            self._shared[kinds] = made, self._state.engine.specialisation(made.structure)
        shared, specialisation = self._shared[kinds]
        found = self._found(shared, specialisation, [own[each] for each in kinds], None if compiling else rows)
        assert found.mixed is not None
        found.mixed.learn(dict(zip(kinds, shared.owners, strict=True)), chosen if compiling else ())
        return found

    def _found(
        self, shared: ByRow, specialisation: Specialisation, chosen: Sequence[Chosen], rows: int | None
    ) -> ActiveAdapters:
        """What serves calls of so many rows in this thread, or all of a compiler, whose graphs are of one structure."""
        if rows is None:
            if specialisation not in self._compiled:
                self._compiled[specialisation] = self._made(shared, specialisation, chosen)
            return self._compiled[specialisation]
        known, key = self._now.known, (specialisation, rows)
        if self._now.generation != self._generation:
            known.clear()
            self._now.generation = self._generation
        known[key] = found = known.pop(key, None) or self._made(shared, specialisation, chosen)
        if len(known) > KEPT:
            del known[next(iter(known))]
        return found

    def _adopt(self, tenant: ActiveAdapters) -> None:
        """A compiler has come to a module in the middle of a call: what it made is for these, in later calls too."""
        self._compiled[tenant.specialisation] = tenant

    def _made(self, shared: ByRow, specialisation: Specialisation, chosen: Sequence[Chosen]) -> ActiveAdapters:
        batch = MixedBatch()
        self._batches.add(batch)
        regions = DEFAULT if self._state.regions == "model" else self._state.regions
        become_regions(self._state.engine.model, self._state.host, shared.structure, regions)
        slot_value = slot_values(shared, chosen)

        def penalty() -> torch.Tensor | None:
            found = [adapter.penalty() for each in batch.present if each is not None for adapter, _ in each.weighed]
            added = [each for each in found if each is not None]
            return sum(added[1:], added[0]) if added else None

        def holders() -> list[nn.Module]:
            rows = [each for each in batch.present if each is not None]
            return [module for each in rows for adapter, _ in each.weighed for module in adapter.modules()]

        return ActiveAdapters(specialisation, slot_value, _no_lookup, True, (penalty,), holders=holders, mixed=batch)

    def shared_by(self, names: Sequence[str]) -> ActiveAdapters:
        """What a graph is made with in which every row has one of these adapters, or none.

        Raises UsageError where one of them cannot be a row's.
        """
        own = {each.kind: each for each in (self._choice(Row(((name, 1.0),))) for name in names)}
        kinds = [kind for kind in self._order if kind in own]
        made = by_row([kind.structure for kind in kinds])
        specialisation = self._state.engine.specialisation(made.structure)
        return ActiveAdapters(specialisation, slot_values(made, [own[each] for each in kinds]), _no_lookup)

    def _is_weight(self, name: str) -> bool:
        return all(at.bound.prompt is None for at in self._state.adapter(name).plan.sites)


def _no_lookup(*_: object) -> torch.Tensor:
    raise AssertionError("rows have adapters of their own")
