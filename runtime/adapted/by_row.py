"""Calls whose rows have adapters of their own: names become choices, choices what regions are served with."""

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import fx, nn

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.foreign.peft import BASE_ROWS, BY_ROW
from peftc.passes.ir.emit import fake_like
from peftc.passes.plan.by_row import ByRow, by_row
from peftc.passes.plan.plan import IDS, ORDER, ROWS, ParamKey
from peftc.passes.plan.structure import rows_slot, site_slot, structure_of
from peftc.runtime.adapted.base_weights import Active
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.execution.engine import ActiveAdapters, Engine, Specialisation
from peftc.runtime.mixed_batch.batch import Assigned, Chosen, MixedBatch
from peftc.runtime.regions.host import Host
from peftc.runtime.regions.modules import become_regions
from peftc.runtime.regions.within import is_within

Name = str | Sequence[str] | Mapping[str, float]
"""What a row has: an adapter, several in order, or several with weights."""


class Adapters(Protocol):
    """What choices are made of."""

    engine: Engine
    host: Host
    enabled: bool

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

    def tenant(self, active: Active) -> ActiveAdapters:
        """What calls are served with while these are active."""
        ...


KEPT = 8
"""For how many batches that differ in more than who has which row a thread keeps what was laid out."""


@dataclass(frozen=True)
class Before:
    """What a thread's calls were served with before the rows of one got adapters of their own."""

    names: tuple[Active, ...] | None
    repeats: frozenset[int]
    tenant: ActiveAdapters | None
    assigned: Assigned | None
    locked: bool


class _Now(threading.local):
    """What the rows of a thread's calls have, and what was laid out for that. A compiler reads whether they have."""

    def __init__(self) -> None:
        self.is_on = False
        self.names: tuple[Active, ...] | None = None
        self.repeats: frozenset[int] = frozenset()
        self.looked: set[ActiveAdapters] = set()
        self.known: dict[tuple[Specialisation, int], ActiveAdapters] = {}
        self.generation = 0


class RowAdapters:
    """The choices of a model's calls by row, and what calls are served with that have them."""

    def __init__(self, state: Adapters):
        self._state = state
        self._chosen: dict[Active, Chosen] = {}
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
        for active in [each for each in self._chosen if any(name in names for name, _ in each)]:
            del self._chosen[active]
        for batch in list(self._batches):
            batch.forget(lambda chosen: any(adapter.plan.name in names for adapter, _ in chosen.weighed))

    @property
    def is_on(self) -> bool:
        """Whether the rows of calls have adapters of their own, in this thread and now."""
        return self._now.is_on

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, names: Any, count: int | None, *, compiling: bool, repeats: frozenset[int] = frozenset()) -> Before:
        """From now on, and in this thread, the rows of calls have these adapters, each its own; None goes on as before.

        `repeats` are how many times as many rows generation will call the model with, or an encoder by itself: so many
        in a row have the same. With `compiling` other names are to need no other graph. Raises UsageError, and changes
        nothing: an unknown name, or a number of rows that the names do not fit.
        """
        compiling = compiling or self._state.host.compiled
        own = self._now.names if names is None else self._read(names)
        assert own is not None
        times, left = (1, 0) if count is None else divmod(count, len(own) or 1)
        if left or not own or times not in {1} | (self._now.repeats if names is None else frozenset()):
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
            if names is not None:
                self._now.repeats = repeats
            self._serve(own, tenant, Assigned(rows, repeats), looked=names is None)
        except BaseException:
            self.leave(before)
            raise
        return before

    def _serve(self, names: tuple[Active, ...], tenant: ActiveAdapters, assigned: Assigned, *, looked: bool) -> None:
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
    def check_within(self, names: Any, modules: Sequence[str]) -> None:
        """Raise UsageError where an adapter has a place outside of these modules, which alone compute with the rows."""
        for name, _ in dict.fromkeys(one for active in self._read(names) for one in active):
            places = (at.site.module for at in self._state.adapter(name).plan.sites)
            for place in places:
                if not any(is_within(place, module) for module in modules):
                    message = f"'{BY_ROW}' cannot be given: adapter {name!r} adapts {place}, whose rows are images"
                    fail(UsageError, "E528", message, help="call once for each adapter, or choose sites of the text")

    def _read(self, names: Any) -> tuple[Active, ...]:
        """The choices that a call's `adapter_names` mean. Raises UsageError, and changes nothing."""
        if isinstance(names, torch.Tensor):
            names = self._by_number(names)
        if isinstance(names, str | Mapping) or not isinstance(names, Sequence):
            message = f"'{BY_ROW}' is a {type(names).__name__}"
            fail(UsageError, "E529", message, help=f"give a list with a name for each row, {BASE_ROWS!r} for none")
        if self._state.displaced or not self._state.enabled:
            why = "adapters are merged" if self._state.displaced else "the adapters are disabled"
            help = "call unmerge_adapter first" if self._state.displaced else "call enable_adapters first"
            fail(UsageError, "E528", f"'{BY_ROW}' cannot be given: {why}", help=help)
        found = tuple(map(_active, names))
        for active in dict.fromkeys(found):
            if active:
                self._choice(active)
        return found

    def _tenant(
        self, names: tuple[Active, ...], times: int, *, compiling: bool
    ) -> tuple[ActiveAdapters, tuple[Chosen | None, ...]]:
        """What calls are served with whose rows have these, so many times each, and what the rows have."""
        kinds = dict.fromkeys(names)
        if len(kinds) == 1 and not compiling:
            return self._state.tenant(names[0]) if names[0] else self._state.engine.plain, ()
        chosen = {active: self._choice(active) if active else None for active in kinds}
        rows = tuple(chosen[each] for each in names for _ in range(times))
        adapted = [each for each in chosen.values() if each is not None]
        return self._sharing(adapted, len(rows), compiling=compiling), rows

    def _choice(self, active: Active) -> Chosen:
        if active not in self._chosen:
            self._state.check(active)
            adapters = [self._state.adapter(name) for name, _ in active]
            weights = [weight for _, weight in active]
            structure = structure_of([(each.plan, each.dtypes()) for each in adapters], weights)
            if structure.fronts:
                message = f"'{BY_ROW}' cannot be given: adapter {active[0][0]!r} puts virtual tokens in front"
                fail(UsageError, "E528", message, help="call once for each adapter that is no weight")
            kind = self._state.engine.specialisation(structure)
            self._order.setdefault(kind)
            self._chosen[active] = Chosen(list(zip(adapters, weights, strict=True)), kind)
        return self._chosen[active]

    def _sharing(self, chosen: Sequence[Chosen], rows: int, *, compiling: bool) -> ActiveAdapters:
        """What serves calls of so many rows that have choices of these structures."""
        if compiling:
            names = [name for name in self._state.names() if self._is_weight(name)]
            chosen = list(dict.fromkeys([*chosen, *(self._choice(((name, 1.0),)) for name in names)]))
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
        become_regions(self._state.engine.model, self._state.host, shared.structure)

        like = _like(shared, chosen)

        def slot_value(position: int, site: str, role: str, near: fx.Node) -> torch.Tensor:
            if role in (ROWS, IDS, ORDER):
                return fake_like(*like[rows_slot(position, site)][role], near)
            tensors = like[site_slot(position, site)]
            if role in tensors:
                return fake_like(*tensors[role], near)
            kinds = [dtype for _, dtype in tensors.values() if dtype.is_floating_point]
            return fake_like((), kinds[0] if kinds else torch.float32, near)

        def penalty() -> torch.Tensor | None:
            found = [adapter.penalty() for each in batch.present if each is not None for adapter, _ in each.weighed]
            added = [each for each in found if each is not None]
            return sum(added[1:], added[0]) if added else None

        def holders() -> list[nn.Module]:
            rows = [each for each in batch.present if each is not None]
            return [module for each in rows for adapter, _ in each.weighed for module in adapter.modules()]

        return ActiveAdapters(specialisation, slot_value, _no_lookup, True, (penalty,), holders=holders, mixed=batch)

    def _is_weight(self, name: str) -> bool:
        return all(at.bound.prompt is None for at in self._state.adapter(name).plan.sites)

    def _by_number(self, ids: torch.Tensor) -> list[str]:
        names = self._state.names()
        numbers = ids.tolist() if ids.dim() == 1 and not ids.is_floating_point() else None
        if numbers is None or any(not -1 <= each < len(names) for each in numbers):
            message = f"'{BY_ROW}' is a tensor that has not the numbers of adapters, one for each row"
            fail(
                UsageError, "E529", message, help=f"give from 0 to {len(names) - 1} in the order of adding, -1 for none"
            )
        return [names[each] if each >= 0 else BASE_ROWS for each in numbers]


def _like(shared: ByRow, chosen: Sequence[Chosen]) -> dict[str, dict[str, tuple[torch.Size, torch.dtype]]]:
    """The sizes and types of what slots have, by role: of one choice that has the slot, which may be gone later."""
    found: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {}
    for owners, each in zip(shared.owners, chosen, strict=True):
        own = {slot: shared_slot for shared_slot, slot in owners.items()}
        for place, (adapter, _) in enumerate(each.weighed):
            name, plan = adapter.plan.name, adapter.plan
            for at in plan.sites:
                tensors = {role: (tensor.shape, tensor.dtype) for role, tensor in adapter.at_site(at.site.name).items()}
                found.setdefault(own[site_slot(place, at.site.name)], tensors)
            for rows in plan.rows:
                trained = {role: adapter.tensor(ParamKey(name, rows.module, role)) for role in (ROWS, IDS, ORDER)}
                kinds = {role: (tensor.shape, tensor.dtype) for role, tensor in trained.items()}
                found.setdefault(own[rows_slot(place, rows.module)], kinds)
    return found


def _active(name: Any) -> Active:
    """What a row is to have, as `set_adapter` reads it."""
    if isinstance(name, str):
        return () if name == BASE_ROWS else ((name, 1.0),)
    if isinstance(name, Mapping):
        return tuple((each, float(weight)) for each, weight in name.items())
    if isinstance(name, Sequence) and all(isinstance(each, str) for each in name):
        return tuple((each, 1.0) for each in name)
    message = f"'{BY_ROW}' has {name!r} for a row"
    fail(UsageError, "E529", message, help="give a name, several in a tuple, or a dictionary of names and weights")


def _no_lookup(*_: object) -> torch.Tensor:
    raise AssertionError("rows have adapters of their own")
