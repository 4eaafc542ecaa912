"""What the active adapters have inside of one module, and the programs that were made of it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from torch import nn

from peftc.passes.cost.cost import Choice
from peftc.passes.foreign import transformers as contract
from peftc.passes.plan.structure import copy_slot, slot_role, storage_slot
from peftc.runtime.execution.engine import STORED, ActiveAdapters, Engine, Specialisation
from peftc.runtime.execution.program import Finder, Held, held_by
from peftc.runtime.mixed_batch.batch import Chosen, MixedBatch
from peftc.runtime.regions.arguments import Arguments
from peftc.runtime.regions.region import Bound, Programs, RegionTrace, Split
from peftc.runtime.regions.template import Template
from peftc.runtime.regions.watch import Holds
from peftc.runtime.regions.within import HEAD, Part


@dataclass(frozen=True, eq=False)
class Recipe:
    """A program before it is bound to adapters' tensors: any of one structure, that are lowered alike, have it."""

    key: Hashable  # equal for those that differ in what they hold for only
    template: Template
    trace: RegionTrace
    holds: Holds
    choice: Choice

    def serves(self, arguments: Arguments, module: nn.Module) -> bool:
        """Whether it is right for a call that differs in sizes from the one that it was made for."""
        return self.holds() and self.trace.fits(arguments.tensors, arguments.cache, module)


@dataclass(eq=False)
class Shared:
    """What adapters of one structure have inside of one module, whichever of them are active."""

    version: int
    part: Part | None
    specialisation: Specialisation | None
    own: tuple[tuple[str, ...], bool] | None = None  # adapted tensors of its own, and whether it must have a graph
    alike: dict[Hashable, list[Recipe | Split]] = field(default_factory=dict)
    recipes: dict[Hashable, Recipe] = field(default_factory=dict)


@dataclass(eq=False)
class Local:
    """What adapters have inside of one module, and its programs with them: by call, and by what made them."""

    shared: Shared
    tenant: ActiveAdapters
    programs: Programs = field(default_factory=dict)
    alike: dict[Hashable, list[Bound | Split]] = field(default_factory=dict)
    bound: dict[Hashable, Bound] = field(default_factory=dict)

    @property
    def part(self) -> Part | None:
        """What the structure has inside; None where there is nothing to run a graph for."""
        return self.shared.part


def where_kept(engine: Engine, module: nn.Module, local: Local) -> Held:
    """Where graphs find what they read: in the module, in the adapters, in what quantized modules store."""
    keep_here(local.tenant.holders())
    find = finder(engine, module, local)
    part, sources = local.part, local.tenant.sources()
    assert part is not None

    def held(owner: str, leaf: str) -> tuple[dict[str, Any], str]:
        return sources.get((part.owner(owner), leaf)) or (held_by(find(owner), leaf), leaf)

    return held


@dataclass(frozen=True, eq=False)
class LocalRows:
    """What the rows of a call have inside of one module."""

    engine: Engine
    module: nn.Module
    local: Local
    batch: MixedBatch

    def slots(self, own: frozenset[str]) -> frozenset[str]:
        """The slots of the model that these of the module are."""
        part = self.local.part
        assert part is not None
        return frozenset(map(part.owner, own))

    def everyone(self, own: frozenset[str]) -> bool:
        """Whether there is a value of these slots for whatever a row has: a trained copy stands for a base's tensor."""
        return own <= {owner for owner, _ in self._copied}

    def held(self, chosen: Chosen | None) -> Held:
        """Where graphs find what they read of one choice."""
        part, find = self.local.part, finder(self.engine, self.module, self.local)
        assert part is not None

        def held(owner: str, leaf: str) -> tuple[dict[str, Any], str]:
            slot = part.owner(owner)
            if chosen is not None and self.batch.has(chosen, (slot,)):
                return self.batch.kept(chosen, slot, leaf)
            owner, leaf = self._copied.get((owner, leaf), (owner, leaf))
            return held_by(find(owner), leaf), leaf

        return held

    @cached_property
    def _copied(self) -> dict[tuple[str, str], tuple[str, str]]:
        """The slots of copies and the names in them, and the base's tensors that they stand for."""
        assert self.local.part is not None
        found = {}
        for copy in self.local.part.structure.copies:
            owner, _, leaf = copy.target.rpartition(".")
            found[copy_slot(copy.position, copy.module), slot_role(copy.tensor)] = (owner, leaf)
        return found


def finder(engine: Engine, module: nn.Module, local: Local) -> Finder:
    """The modules that graphs of a region read from."""
    part = local.part
    assert part is not None

    @cache
    def stored() -> dict[str, str]:
        names = [name for name, _ in module.named_modules(remove_duplicate=False)]
        return {storage_slot(f"{HEAD}.{name}".rstrip(".")): f"{part.path}.{name}".rstrip(".") for name in names}

    def find(owner: str) -> nn.Module:
        if owner == HEAD or owner.startswith(f"{HEAD}."):
            return module.get_submodule(owner[len(HEAD) + 1 :])
        held = stored().get(owner) if owner.startswith(STORED) else None
        return engine.find(part.owner(owner) if held is None else storage_slot(held))

    return find


def keep_here(holders: Sequence[nn.Module]) -> None:
    """Have adapters where they are computed with: accelerate would bring what it took away when a module is called, and
    these are only read.
    """
    for each in holders:
        hook = vars(each).pop(contract.OFFLOADED, None)
        if hook is not None:
            hook.detach_hook(each)
            for name in ("forward", "_old_forward"):
                vars(each).pop(name, None)
