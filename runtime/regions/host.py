"""What regions of one model share: traces of modules alike, the active adapters' parts, programs."""

import re
import threading
import types
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from peftc.grammar.diagnostics import AdapterError, ModelError, fail
from peftc.passes.cost.cost import Choice
from peftc.passes.plan.plain import plain_class
from peftc.passes.plan.structure import Structure
from peftc.passes.route.route_rows import draws_numbers
from peftc.runtime.execution import nest
from peftc.runtime.execution.engine import COMPILED, ActiveAdapters, Engine, Specialisation
from peftc.runtime.execution.outside import outside
from peftc.runtime.execution.program import Lowered
from peftc.runtime.execution.segments import Recompute
from peftc.runtime.execution.virtual import no_task
from peftc.runtime.regions.arguments import Arguments
from peftc.runtime.regions.code import watch_code
from peftc.runtime.regions.compiled import graph_of, inlined
from peftc.runtime.regions.kinds import split_by
from peftc.runtime.regions.local import Local, LocalRows, Recipe, Shared, where_kept
from peftc.runtime.regions.owned import has_more, owned_tensors
from peftc.runtime.regions.region import KEPT, Bound, Region, RegionTrace, Split
from peftc.runtime.regions.template import Template
from peftc.runtime.regions.traces import Traces
from peftc.runtime.regions.watch import Facts, Holds, watch, while_attached
from peftc.runtime.regions.within import HEAD, Part, is_within, moved, part_of, standing

_LOCK = threading.RLock()
IN_TURN = "numbers are drawn for the rows of a module inside, after others that this one draws"
DISORDER = "E425"
"""The error of rows that are in another order: modules further in cannot tell."""


class _Pinned(threading.local):
    """What modules are served with in a thread. A compiler asks whether there is such an attribute: there always is."""

    def __init__(self) -> None:
        self.tenant: ActiveAdapters | None = None


class Host:
    """Makes programs for the regions of a model."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.regions: dict[str, Region] = {}
        self.stored: set[str] = set()  # modules that store their weight packed, which graphs compute with
        self.packed: set[str] = set()  # regions with such modules
        self.traces = Traces(engine.backend.trace_region)
        self._templates: dict[Hashable, Template] = {}
        self._version = 0
        self.compiled = False  # whether a compiler has graphs that read slots
        self._entered: Specialisation | None = None
        self._numbers: dict[Specialisation, int] = {}
        self._pinned = _Pinned()
        self.adopt: Callable[[ActiveAdapters], None] = lambda _: None  # what keeps those that a compiler has a graph of
        self.renew: Callable[[], None] = lambda: None  # what lets modules in the place of regions be such
        self._code: Holds | None = None
        self._places: list[tuple[dict[str, Any], str, nn.Module | None]] = []

    @contextmanager
    def pinned(self, tenant: ActiveAdapters | None = None) -> Iterator[ActiveAdapters]:
        """Inside, and in this thread, modules are served with these adapters, or those that are active now."""
        before = self._pinned.tenant
        self._pinned.tenant = tenant = tenant or self.engine.active
        try:
            yield tenant
        finally:
            self._pinned.tenant = before

    def pin(self, tenant: ActiveAdapters | None) -> ActiveAdapters | None:
        """From now on, and in this thread, modules are served with these; None: with those that are active. Returns
        what they were served with before.
        """
        before = self._pinned.tenant
        self._pinned.tenant = tenant
        return before

    @property
    def now(self) -> ActiveAdapters:
        """What modules are served with in this thread."""
        return self._pinned.tenant or self.engine.active

    def local(self, path: str) -> Local:
        """What the active adapters have inside of a module."""
        tenant = self.now
        found: Local | None = tenant.regions.get(path)
        if found is None or found.shared.version != self._version:
            found = tenant.regions[path] = Local(self._shared(tenant.specialisation, path), tenant)
        return found

    def _shared(self, specialisation: Specialisation, path: str) -> Shared:
        found: Shared | None = specialisation.regions.get(path)
        if found is None or found.version != self._version:
            part = self.part(specialisation.structure, path)
            own = None if part is None else self.engine.specialisation(part.structure)
            found = specialisation.regions[path] = Shared(self._version, part, own)
        return found

    def part(self, structure: Structure, path: str) -> Part | None:
        """What of a structure is inside of a region; None where there is nothing to run a graph for."""
        found = part_of(structure, path)
        return Part(path, Structure(), {}) if found is None and path in self.packed else found

    @property
    def recompute(self) -> Recompute | None:
        """How layers are computed again in the backward pass, if they are."""
        return self.engine.recompute

    def reset(self) -> None:
        """Forget everything that was made: the model was moved, or holds something else."""
        self._version += 1
        self.traces.clear()
        self._templates.clear()
        for specialisation in self._numbers:
            specialisation.regions.clear()
        for each in self.regions.values():
            each.opaque.clear()
            each.plain = types.MethodType(plain_class(each.module).forward, each.module)

    def look(self) -> None:
        """Remember which modules stand where regions are, and around them."""
        model, paths = self.engine.model, dict.fromkeys(self.regions)
        for path in self.regions:
            while path := path.rpartition(".")[0]:
                paths[path] = None
        self._places = []
        for path in paths:
            owner, _, leaf = path.rpartition(".")
            parent = standing(model, owner)
            if parent is not None:
                self._places.append((parent._modules, leaf, parent._modules.get(leaf)))

    @property
    def is_settled(self) -> bool:
        """Whether the modules stand there still: a few microseconds."""
        return all(held.get(leaf) is module for held, leaf, module in self._places)

    def check_code(self) -> None:
        """Forget every graph if the code of the model's classes is another: a few microseconds where it is not."""
        if self._code is not None and self._code():
            return
        if self._code is not None:
            self.engine.reset()
        self._code = watch_code(self.engine.model)

    def told(self, *, replaced: bool) -> None:
        """There is another region, which `enter` has not told anything, or one in the place of another."""
        self._entered = None
        self._version += replaced  # programs are bound to the module that was there

    def holds_packed(self, modules: Collection[str], regions: Collection[str]) -> None:
        """These modules, in these regions, store their weight packed."""
        self._version += not self.packed.issuperset(regions)
        self.stored.update(modules)
        self.packed.update(regions)

    def enter(self, specialisation: Specialisation | None = None) -> None:
        """Let regions know whether the active adapters, or those of another structure, adapt weights of their own: what
        compilers ask.
        """
        specialisation = specialisation or self.engine.active.specialisation
        if specialisation is self._entered:
            return
        number = self._numbers.setdefault(specialisation, len(self._numbers) + 1)
        structure = specialisation.structure
        users = {at.site.user for at in structure.sites} | {each.module for each in structure.rows}
        users |= {copy.target.rpartition(".")[0] for copy in structure.copies} | self.stored
        for path, region in self.regions.items():
            region.owned, region.structure = path in users, number
        self._entered = specialisation

    def inlined(self, region: Region, tensors: Sequence[torch.Tensor], names: tuple[str, ...]) -> Any:
        """What an adapted module gives for these tensors, the last of them by name, while torch traces it."""
        with _LOCK:
            found = inlined(self, region, tensors, names)
        return found(Arguments(tensors=list(tensors)))

    def graph(self, region: Region, form: Any, names: tuple[str, ...]) -> nn.Module:
        """The graph of an adapted module for a compiler, which reads adapters from slots, or what rows have of them."""
        with _LOCK:
            made = graph_of(self, region, form, names)
            if not self.compiled and self.now.mixed is not None:
                self.adopt(self.now)
            self.compiled = True
        return made

    def refresh_rows(self, tenant: ActiveAdapters) -> None:
        """Let graphs that a compiler has read what rows have now."""
        for each in tenant.compiled:
            each.refresh()

    def program(
        self,
        region: Region,
        local: Local,
        alike: Hashable,
        arguments: Arguments,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Bound | Split:
        """The program for a call, made now if there is none; or why there is none. Calls of one key may share it."""
        with _LOCK, outside():
            if not self.is_settled:
                self.renew()
            known = local.shared.alike.setdefault(alike, [])
            for each in known:
                if each.serves(arguments, region.module):
                    if isinstance(each, Split):
                        return each
                    if each.choice == self._choice(arguments, local):
                        return self._bound(each, region.module, local)
            found = self._recipe(region, local, arguments, args, kwargs)
            known[:] = [found, *known[: KEPT - 1]]
            return found if isinstance(found, Split) else self._bound(found, region.module, local)

    def own_weights(self, region: Region, local: Local, reason: str) -> Mapping[str, torch.Tensor]:
        """The adapted tensors of a module's own, for its Python to run with. Computed outside of autocast, which would
        round them. Raises ModelError where adapters of it are no weights, and so cannot act in its Python.
        """
        assert local.part is not None
        module = region.module
        if local.shared.own is None:
            local.shared.own = owned_tensors(module, local.part.structure), self.is_refused(region, local.part)
        names, refused = local.shared.own
        if refused or (names and not local.tenant.is_one_for_all):
            message = f"{region.path or 'the model'} holds adapted weights and has no graph: {reason}"
            fail(ModelError, "E465", message, help="choose other sites")
        if not names:
            return {}
        key = ("weights", module.training, *((name, _kind(module, name)) for name in names))
        found = local.programs.get(key)
        if not isinstance(found, Bound):
            with _LOCK, outside():
                traced = self.engine.backend.trace_weights(module, names)
                trace = RegionTrace(traced, Facts())
                lowered = self.lowered(trace, local, False, Choice(dense=frozenset(names)), module)
                code = Template(lowered, traced.constants).bind(where_kept(self.engine, module, local))
            found = Bound(code, (), False, False, lambda: True)
            local.programs[key] = found
        with torch.autocast(next(module.parameters()).device.type, enabled=False):
            return dict(zip(names, found.code.function(found.code.root), strict=True))

    def is_refused(self, region: Region, part: Part) -> bool:
        """Whether a module must have a graph: its own adapters are no weights, or are of one that is stored packed."""
        names = owned_tensors(region.module, part.structure)
        return has_more(part.structure) or any(self._is_stored(region.path, name) for name in names)

    def _is_stored(self, path: str, name: str) -> bool:
        """Whether a tensor below a module is one of a module that stores it packed."""
        return f"{path}.{name}".lstrip(".").rpartition(".")[0] in self.stored

    def _recipe(
        self, region: Region, local: Local, arguments: Arguments, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Recipe | Split:
        module, recipes = region.module, local.shared.recipes
        why = split_by(module, region.path)
        if why:
            return Split(why, while_attached(module))
        autocast = torch.is_autocast_enabled(arguments.device)
        try:
            trace = self.traces.find(module, arguments, args, kwargs)
        except AdapterError as error:
            return Split(error.diagnostics[0].message, watch(module, Facts()))
        choice = self._choice(arguments, local)
        key = (id(trace), id(local.shared.specialisation), autocast, choice, module.training)
        found = recipes.get(key)
        if found is None or not found.holds():
            template = self._templates.get(key)
            if template is None:
                try:
                    lowered = self.lowered(trace, local, autocast, choice, module)
                except AdapterError as error:
                    told = error.diagnostics[0]
                    if local.tenant.is_one_for_all or told.code == DISORDER:
                        raise
                    return Split(told.message, watch(module, trace.facts))  # it may fit further in
                inside = all(at.site.user != HEAD for at in local.part.structure.sites) if local.part else False
                if inside and any(each.draws for each in lowered.lanes) and draws_numbers(trace.traced.graph):
                    return Split(IN_TURN, watch(module, trace.facts))
                template = self._templates[key] = Template(lowered, trace.traced.constants)
            found = recipes[key] = Recipe(key, template, trace, watch(module, trace.facts), choice)
        return found

    def _bound(self, recipe: Recipe, module: nn.Module, local: Local) -> Bound:
        """What a recipe gives with the tensors of the active adapters."""
        found = local.bound.get(recipe.key)
        if found is None or found.holds is not recipe.holds:
            trace, mixed, kept = recipe.trace, local.tenant.mixed, where_kept(self.engine, module, local)
            rows = None if mixed is None else LocalRows(self.engine, module, local, mixed)
            code = recipe.template.bind(kept, rows)
            form: nest.Form = trace.traced.outputs  # type: ignore[assignment]
            single, gates = form[0] == nest.TENSOR, local.tenant.gates
            found = Bound(code, form, single, bool(trace.updates), recipe.holds, trace, gates)
            local.bound[recipe.key] = found
        return found

    def lowered(self, trace: RegionTrace, local: Local, autocast: bool, choice: Choice, module: nn.Module) -> Lowered:
        """A trace with what adapters have inside of its module. Raises ModelError."""
        tenant, part = local.tenant, local.part
        assert part is not None
        if part.structure.tasks and tenant.mixed is None:
            no_task(part.structure.tasks)

        def slot_value(position: int, site: str, role: str, near: fx.Node) -> torch.Tensor:
            return tenant.slot_value(position, part.absolute(site), role, near)

        try:
            graph = self.engine.backend.specialise(
                trace.traced,
                part.structure,
                slot_value,
                training=module.training,
                autocast=autocast,
                choice=choice,
                mode="",
                region=module,
            )
        except ModelError as error:  # names are those within the region
            told = (replace(each, message=_named(each.message, part)) for each in error.diagnostics)
            raise ModelError(*told) from error.__cause__
        return self.engine.backend.lower(graph, autocast=autocast, choice=choice, by_row=tenant.mixed is not None)

    def _choice(self, arguments: Arguments, local: Local) -> Choice:
        assert local.part is not None
        if not local.tenant.is_one_for_all:
            return COMPILED
        choice, path = self.engine.choice(arguments.tokens, arguments.device, local.tenant), local.part.path
        return Choice(_below(choice.dense, path), _below(choice.kept, path), choice.frozen)


def _kind(module: nn.Module, name: str) -> Hashable:
    owner, _, leaf = name.rpartition(".")
    value: torch.Tensor = getattr(module.get_submodule(owner), leaf)
    return value.shape, value.dtype, value.device


def _named(message: str, part: Part) -> str:
    return re.sub(rf"\b{HEAD}\b(?=[. ]|$)", part.path, message)


def _below(names: frozenset[str], path: str) -> frozenset[str]:
    return frozenset(moved(name, path, HEAD) for name in names if is_within(name, path))
