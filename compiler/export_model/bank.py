"""The adapters that rows of a program choose from: the graph for all of them, and what each has of what it reads."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from peftc.compiler.export_model.slots import state_name
from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.export.bank_pieces import Piece, digest_of, owners, pieces_of
from peftc.passes.export.fold import computed, fixed_nodes
from peftc.passes.export.lift import Lifted
from peftc.passes.export.route import is_tall
from peftc.passes.foreign.peft import BASE_ROWS
from peftc.passes.plan.structure import MEMBER, Structure, copy_slot, site_slot, slot_role, structure_of
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.adapters.room import empty, largest, largest_rank, padded, with_rank
from peftc.runtime.execution.engine import ActiveAdapters, Engine
from peftc.runtime.model.model import AdaptedModel

Tensors = Mapping[str, torch.Tensor]
"""The tensors of slots by their attribute paths, or pieces by their names."""


@dataclass(frozen=True)
class Bank:
    """Adapters that rows choose from.

    `own` are, for each by name, the tensors of its slots, `room` tensors for slots as large as another's may be, and
    `base` the base's own where an adapter may have a copy. `constants` are slots whose tensors are one for all.
    With `active` one graph has every adapter, and none: without, what stands in front of a text or of a cache does so
    in every row.
    """

    own: Mapping[str, Tensors]
    room: Mapping[str, Tensors]
    base: Tensors
    constants: frozenset[str]
    active: ActiveAdapters | None

    @property
    def has_base(self) -> bool:
        """Whether a row may have none of the adapters."""
        return self.active is not None

    @property
    def names(self) -> tuple[str, ...]:
        """Whose the rows of the bank are, in order."""
        return (*([BASE_ROWS] if self.has_base else ()), *self.own)

    @contextmanager
    def served(self, engine: Engine) -> Iterator[None]:
        """Inside, graphs are made for these adapters, where one of them is active already."""
        if self.active is None:
            yield
            return
        engine.bind()
        before = engine.active
        engine.activate(self.active)
        try:
            yield
        finally:
            engine.activate(before)

    def sample(self, path: str) -> torch.Tensor:
        """What a slot may have."""
        found = next((each[path] for each in self.own.values() if path in each), None)
        if found is None:
            assert path.endswith(f".{MEMBER}"), path
            return torch.tensor(True, device=next(iter(next(iter(self.own.values())).values())).device)
        return found

    def pieces(self, lifted: Lifted, slots: Mapping[str, str]) -> "Pieces":
        """What a lifted graph reads of each adapter. `slots` are its slots' paths, by what programs call these."""
        names = {state_name(name): name for name in slots}
        paths = {state_name(name): path for name, path in slots.items()}
        constants = frozenset(name for name, path in paths.items() if path in self.constants)
        found = tuple(each for each in pieces_of(lifted, names) if not each.reads <= constants)
        reads = {each.name: owners([paths[name] for name in each.reads]) for each in found}
        return Pieces(self, lifted, names, paths, constants, found, reads)


@dataclass(frozen=True)
class Pieces:
    """What a lifted graph reads of each adapter.

    `names` and `paths` are, for the tensors of slots in that graph, what programs call them and the slots' own,
    `constants` those that are one for all; `owners` the slots that each piece is made of, by the piece's name.
    """

    bank: Bank
    lifted: Lifted
    names: Mapping[str, str]
    paths: Mapping[str, str]
    constants: frozenset[str]
    all: tuple[Piece, ...]
    owners: Mapping[str, frozenset[str]]

    def of(self, own: Tensors) -> dict[str, torch.Tensor]:
        """The pieces that an adapter with these tensors has: of slots that it, or else the base, has all of."""
        held = {**self.bank.base, **own}
        owned, adapted = owners(held), owners(own)
        values = {}
        for node, name in self.lifted.names.items():
            path = self.paths.get(name, "")
            owner, _, leaf = path.rpartition(".")
            if path in held:
                values[node] = held[path]
            elif leaf == MEMBER and owner in adapted:
                values[node] = torch.ones_like(self.lifted.tensors[node])
        had = {each.node: each.name for each in self.all if self.owners[each.name] <= owned}
        known = {self.lifted.names[node] for node in values}
        assert all(each.reads <= known for each in self.all if each.node in had), (
            "of a slot an adapter has all or nothing"
        )
        (found,) = computed(self.lifted, [values], dict.fromkeys(had))
        return {had[node]: value.contiguous() for node, value in found.items()}

    def rows(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, list[int]]]:
        """The pieces of each row of the bank by its name, all of one size, and that size of each piece."""
        bank = self.bank
        own = {name: self.of(tensors) for name, tensors in bank.own.items()}
        more = [self.of({**bank.own[name], **room}) for name, room in bank.room.items()]
        known = (*own.values(), *more)
        made = {each.name: [found[each.name] for found in known if each.name in found] for each in self.all}
        sizes = {name: largest(values) for name, values in made.items()}
        rows = {BASE_ROWS: self.of({})} if bank.has_base else {}
        filler = {each.name: self._filler(each, made[each.name][0]) for each in self.all}
        return {
            row: {name: padded(pieces.get(name, filler[name]), size) for name, size in sizes.items()}
            for row, pieces in {**rows, **own}.items()
        }, sizes

    def turned(self, sizes: Mapping[str, Sequence[int]]) -> frozenset[str]:
        """The pieces that are kept turned."""
        fixed = fixed_nodes(self.lifted, self.lifted.tensors_named(frozenset(self.names)))
        straight = {each.name for each in self.all if not is_tall(each.node, sizes[each.name], fixed)}
        return frozenset(name for name in sizes if name not in straight)

    def _filler(self, piece: Piece, value: torch.Tensor) -> torch.Tensor:
        """What stands where an adapter has not the piece: nothing, or, where nobody looks, whatever another has."""
        if piece.is_member:
            return torch.zeros_like(value)
        lanes = [owner for each in self.all if each.is_member for owner in self.owners[each.name]]
        if self.owners[piece.name] & set(lanes):
            return value
        return torch.full_like(value, empty(value.dtype))


def read_bank(adapted: AdaptedModel, names: Sequence[str], rank: int | None = None) -> Bank:
    """The bank of these adapters, with room for others of this rank, or else of the largest that there is.

    Raises UsageError where one graph cannot have them all, or the rank has no meaning.
    """
    state = adapted._adapter_state
    parameters = {name: state.adapter(name) for name in names}
    structures = {name: structure_of([(each.plan, each.dtypes())]) for name, each in parameters.items()}
    own = {name: dict(state.engine.slots.tensors(each)) for name, each in parameters.items()}
    active = None
    if any(each.fronts for each in structures.values()):
        check_alike(parameters)
    else:
        active = state.rows.shared_by(names)
        _check_lanes(active.specialisation.structure, structures)
    if BASE_ROWS in names:
        message = f"an adapter is called {BASE_ROWS!r}, which stands for rows that have none"
        fail(UsageError, "E649", message, help="give it another name")
    if rank is not None:
        _check_rank(parameters, rank)
    room = {name: with_rank(each, rank) for name, each in parameters.items()} if rank is not None else {}
    base = {path: tensor for each in structures.values() for path, tensor in _base_copies(state.engine, each)}
    return Bank(own, room, base if active is not None else {}, _constants(parameters, own), active)


def bank_facts(bank: Bank) -> dict[str, Any]:
    """What a manifest says of a bank: whether a row may have none of the adapters, and what is one for all of them."""
    return {"base": bank.has_base, "constants": {path: digest_of(bank.sample(path)) for path in sorted(bank.constants)}}


def _base_copies(engine: Engine, structure: Structure) -> Iterator[tuple[str, torch.Tensor]]:
    """What the base has where an adapter has copies."""
    for copy in structure.copies:
        owner, _, leaf = copy.target.rpartition(".")
        value = getattr(engine.find(owner), leaf, None)
        if isinstance(value, torch.Tensor):
            yield f"{copy_slot(0, copy.module)}.{slot_role(copy.tensor)}", value.detach().to(copy.dtype)


def _constants(parameters: Mapping[str, AdapterParameters], own: Mapping[str, Tensors]) -> frozenset[str]:
    """Slots of tensors that no one trains, and that are equal in all adapters that have them."""
    found: dict[str, torch.Tensor | None] = {}
    for name, adapter in parameters.items():
        for at in adapter.plan.sites:
            frozen = {rule.role for rule in at.bound.rule.params if not rule.trained}
            for param in at.bound.params:
                path = f"{site_slot(0, at.site.name)}.{slot_role(param.role)}"
                if param.role in frozen and path in own[name]:
                    value, first = own[name][path], found.setdefault(path, own[name][path])
                    if first is not value and (first is None or not _is_equal(first, value)):
                        found[path] = None
    return frozenset(path for path, value in found.items() if value is not None)


def _is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _check_rank(parameters: Mapping[str, AdapterParameters], rank: int) -> None:
    ranks = {name: largest_rank(each) for name, each in parameters.items()}
    name, most = max(ranks.items(), key=lambda each: each[1])
    if not most:
        message = "rank has no meaning here: none of the adapters has a rank that another could have in its place"
        fail(UsageError, "E640", message, help="leave it out")
    if rank < most:
        fail(UsageError, "E649", f"rank cannot be {rank}: adapter {name!r} has {most}", help=f"give {most} or more")


HELP = "say which with adapter_names, or --adapter: of one method at a site, of one rank if it is no low-rank sum"


def _check_lanes(shared: Structure, structures: Mapping[str, Structure]) -> None:
    """Raise UsageError where adapters are of different methods at a site, or of ranks that no graph has together."""
    for at in shared.sites:
        if len(at.lanes) > 1:
            terms = {name: each.terms for name, own in structures.items() for each in own.sites if each.site == at.site}
            first, *others = terms
            other = next((name for name in others if terms[name] != terms[first]), first)
            message = f"adapters {first!r} and {other!r} are not laid out alike at {at.site.name}"
            fail(UsageError, "E646", f"{message}, and one program serves alike ones", help=HELP)


def check_alike(parameters: Mapping[str, AdapterParameters]) -> None:
    """Raise UsageError where adapters are not the same but for values."""
    first: tuple[object, object] | None = None
    for name, adapter in parameters.items():
        sizes = [(key.site, key.role, tuple(tensor.shape)) for key, tensor in adapter.items()]
        structure = structure_of([(adapter.plan, adapter.dtypes())])
        if first is None:
            first = structure, sizes
        elif first != (structure, sizes):
            message = f"adapters {next(iter(parameters))!r} and {name!r} are not laid out alike"
            help = "say which with adapter_names, or --adapter: same method, places and sizes"
            fail(UsageError, "E646", f"{message}, and one program serves alike ones", help=help)
