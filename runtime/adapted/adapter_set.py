"""The adapters of one model: which there are, which are active."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from peftc.grammar.diagnostics import ModelError, UsageError, did_you_mean, fail
from peftc.grammar.spec.spec import Regions
from peftc.passes.foreign import transformers as contract
from peftc.passes.plan.plan import AdapterPlan
from peftc.passes.plan.structure import structure_of
from peftc.runtime.adapted.base_weights import Active, BaseWeights, base_view
from peftc.runtime.adapted.by_input import InputRouting, check_weighable
from peftc.runtime.adapted.by_row import RowAdapters
from peftc.runtime.adapted.routed_call import Route, Routed
from peftc.runtime.adapted.tenant import tenant_of
from peftc.runtime.adapted.together import check_together
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.adapters.room import roomy
from peftc.runtime.adapters.slots import Binding
from peftc.runtime.base.overlay import BANK
from peftc.runtime.base.replaced import Replaced
from peftc.runtime.execution.engine import ActiveAdapters, Engine, Specialisation
from peftc.runtime.regions.host import Host
from peftc.runtime.regions.kinds import attached, mixed
from peftc.runtime.regions.modules import become_regions, layers_become_regions, renew_regions
from peftc.runtime.regions.outline import partition_of
from peftc.runtime.regions.partition import Partition
from peftc.runtime.regions.places import DEFAULT, why_whole
from peftc.runtime.regions.watch import Holds
from peftc.runtime.regions.whole import watch_whole

ROUTE = "_route"
"""Beside the adapters, the module that is a route."""

Bindings = Callable[[], Sequence[Binding]]
"""What puts the tensors of adapters into slots, worked out when a graph first reads these."""


@dataclass
class AdapterSet:
    """Owns the adapters of a model and which are active. Every change goes through `activate`, which checks first and
    then cannot fail.
    """

    engine: Engine
    bank: nn.Module
    base: BaseWeights
    active: Active = ()
    enabled: bool = True
    regions: Regions = DEFAULT
    host: Host = field(init=False)
    rows: RowAdapters = field(init=False)
    inputs: InputRouting = field(init=False)
    configs: dict[str, tuple[object, Any]] = field(default_factory=dict)  # PEFT's, as they were asked for
    shown_configs: dict[str, Any] = field(default_factory=dict)  # what `peft_config` gives: always this very one
    routed: Routed | None = None  # a route that says how much of some adapters each token is given
    room: int = 0  # the rank up to which another adapter fits into what a compiler has
    _holds: Holds | None = None  # whether the model is as graphs of the whole were made for
    _prepared: dict[Active, tuple[ActiveAdapters, Bindings]] = field(default_factory=dict)
    _placed: set[tuple[Specialisation, Regions]] = field(default_factory=set)  # whose modules are regions

    def __post_init__(self) -> None:
        self.host = Host(self.engine)
        self.rows = RowAdapters(self)
        self.inputs = InputRouting(self)
        self.engine.when_reset.append(self.host.reset)
        self.host.renew = self._renew

    def __reduce__(self) -> Any:
        """Without programs, and not yet activated: see `AdaptedModule.__setstate__`."""
        kept = ("active", "enabled", "regions", "room", "routed")
        state = {name: getattr(self, name) for name in kept}
        return AdapterSet, (self.engine, self.bank, self.base), state

    @property
    def whole(self) -> bool:
        """Whether a call of the model runs one graph: as asked, or since what is active needs it. Not where rows have
        adapters of their own.
        """
        if self.rows.is_on:
            return False
        return self.regions == "model" or bool(why_whole(self.engine.structure))

    def _renew(self) -> None:
        """Let modules in the place of regions be such; not those that stand there while weights are merged."""
        if not self.displaced:
            renew_regions(self.engine.model, self.host)

    def settle(self) -> None:
        """Before a call: modules in the place of regions are such, and what is of other code is made anew."""
        self.host.check_code()
        if not self.host.is_settled:
            self.host.renew()

    def run_whole(self, entry: str, arguments: Mapping[str, Any]) -> Any:
        """Call the model, or a module in it, by one graph. What was changed in the model since is seen.

        Raises ModelError where something would not run in a graph: a hook inside, a forward of a module's own.
        """
        if not torch.compiler.is_compiling():
            self.host.check_code()
            if not self.is_as_traced:
                self._look()
        return self.engine.run(entry, arguments)

    @property
    def is_as_traced(self) -> bool:
        """Whether the model is as it was when a call first met its graphs."""
        return self._holds is not None and self._holds()

    def _look(self) -> None:
        base = base_view(self.engine.model)
        adapted = {at.site.user for at in self.engine.structure.sites}
        why = attached(base, ignored=contract.is_idle_hook) or mixed(base, "", adapted)
        if why:
            help = f'take it away, or choose regions="layers"; what needs one graph: {self._needs()}'
            fail(ModelError, "E467", f"one graph of the whole model would not have it: {why}", help=help)
        if self._holds is not None:
            self.engine.forget()
        self.watch()

    def watch(self) -> None:
        """The model is now as its graphs are made for."""
        self._holds = watch_whole(self.engine.model)

    def _needs(self) -> str:
        return why_whole(self.engine.structure) or f'regions = "{self.regions}"'

    @property
    def tasks(self) -> int:
        """How many tasks the weights of the active adapters are for, also while these rest; 0 where they have none."""
        return self.tenant(self.active).specialisation.structure.tasks if self.active else 0

    def partition(self) -> Partition:
        """Which modules run graphs now, and why."""
        return partition_of(self.host, self.engine.structure, self.regions)

    @property
    def displaced(self) -> Replaced:
        """What is merged has the place of these; empty where nothing is."""
        return self.base.displaced

    def adapter(self, name: str) -> AdapterParameters:
        """The adapter of that name. Raises UsageError with the nearest names."""
        found = self.bank._modules.get(name)
        if not isinstance(found, AdapterParameters):
            known = self.names()
            help = did_you_mean(name, known) or (f"the adapters are {', '.join(known)}" if known else "there is none")
            fail(UsageError, "E510", f"there is no adapter {name!r}", help=help)
        return found

    def names(self) -> tuple[str, ...]:
        """All adapters, in the order they were added."""
        return tuple(name for name in self.bank._modules if name != ROUTE)

    def plans(self) -> dict[str, AdapterPlan]:
        """Every adapter's plan."""
        return {name: self.adapter(name).plan for name in self.names()}

    def check_name(self, name: str, help: str = "choose another name or delete it") -> None:
        """Raise UsageError if no adapter can be added under this name."""
        if name in self.bank._modules and name != ROUTE:
            fail(UsageError, "E511", f"there already is an adapter {name!r}", help=help)
        if name == ROUTE or hasattr(self.bank, name):  # the adapters are modules, and reached by their names
            help = "choose another name; in a spec, or by adapter_name"
            fail(UsageError, "E575", f"an adapter cannot be called {name!r}: modules of torch have that", help=help)

    def add(
        self, adapters: Sequence[AdapterParameters], active: Active | None = None, *, trainable: bool | None = None
    ) -> None:
        """Put adapters beside the others, and activate these if any are said: all of it, or nothing on an error.

        Raises UsageError if a name is taken, and as `activate`.
        """
        before = self.active
        known = () if trainable is None else [self.adapter(name) for name in self.names()]
        trained = [(each, each.is_trainable, each.frozen) for each in known]
        added: list[str] = []
        try:
            for adapter in adapters:
                self.check_name(adapter.plan.name)
                self.bank.add_module(adapter.plan.name, adapter)
                added.append(adapter.plan.name)
            if active is not None:
                self.activate(active, trainable=trainable)
        except BaseException:
            self._forget(added)
            for adapter, is_trained, frozen in trained:
                adapter.train_only(is_trained)
                adapter.frozen = frozen
            self.activate(before)
            raise

    def set_route(
        self,
        route: Route | None,
        names: Sequence[str],
        known: Collection[str],
        *,
        name: str = "default",
        activate: bool = True,
    ) -> None:
        """Let a route say how much of these adapters each token is given; None takes the present one away.

        They become active unless they are, or `activate` says not. Raises UsageError, and changes nothing, as
        `InputRouting.read` and `activate`.
        """
        before, trained = (self.routed, self.bank._modules.get(ROUTE)), list[AdapterParameters]()
        self.inputs.clear()
        try:
            self.routed = None if route is None else self.inputs.read(name, route, names, known)
            self._place_route(route if isinstance(route, nn.Module) else None)
            weights = dict(self.active)
            missing = tuple((each, 1.0) for each in names if each not in weights)
            if route is not None and activate and any(self.adapter(each).is_trainable for each in weights):
                trained = [
                    each for each in map(self.adapter, dict(missing)) if not each.frozen and not each.is_trainable
                ]
                for each in trained:
                    each.train_only(True)
            self.activate((*self.active, *missing) if route is not None and activate else self.active)
        except BaseException:
            self.routed = before[0]
            self._place_route(before[1])
            for each in trained:
                each.train_only(False)
            self.activate(self.active)
            raise

    def _place_route(self, module: nn.Module | None) -> None:
        self.bank._modules.pop(ROUTE, None)
        if module is not None:
            self.bank.add_module(ROUTE, module)

    def remove(self, name: str) -> None:
        """Take an adapter away; if it was active, the others that were stay active."""
        self.adapter(name)
        self._forget([name])
        self.activate(tuple(each for each in self.active if each[0] != name))

    def replace(self, name: str, adapter: AdapterParameters) -> None:
        """Put an adapter in the place of one, active as that is. Raises UsageError, and changes nothing, as `check`."""
        others = [adapter if each == name else self.adapter(each) for each, _ in self.active]
        check_together(self.active, others)
        if self.routed is not None and name in self.routed.names:
            check_weighable(adapter)
        order = tuple(self.bank._modules)
        self._forget([name])
        self.bank.add_module(name, adapter)
        modules = {each: self.bank._modules[each] for each in order}
        self.bank._modules.clear()
        self.bank._modules.update(modules)
        self.activate(self.active)

    def train(self, names: Sequence[str], trainable: bool) -> None:
        """Whether gradients reach these, active or not. Raises UsageError, and changes nothing, for an unknown name."""
        for adapter in [self.adapter(name) for name in names]:
            adapter.train_only(trainable)
            adapter.frozen = not trainable
        self.activate(self.active)

    def activate(self, active: Active, *, trainable: bool | None = None) -> None:
        """Make exactly these adapters active. `trainable` sets whether gradients reach them; None leaves that.

        Raises UsageError, before anything changes, for an unknown name, a name twice, a weight its method cannot
        carry, or two adapters that train a copy of the same tensor.
        """
        self.check(active)
        self.inputs.check(active)
        chosen = {name for name, _ in active}
        self.active = active
        if trainable is not None:
            for name in self.names():
                adapter = self.adapter(name)
                if name in chosen or not adapter.frozen or adapter.is_trainable:
                    adapter.train_only(trainable and name in chosen)
            for name in chosen:
                self.adapter(name).frozen = not trainable
        if self.enabled and not self.displaced:
            tenant, bindings = self.tenant(active), self._prepared[active][1]
            if self.inputs.holds(active):
                tenant = self.inputs.gated(tenant, active)
            self.engine.activate(tenant, bindings)
            if self.whole or self.host.compiled:
                self.engine.bind()
        else:
            self.engine.activate(self.engine.plain)
        self.host.enter()

    def tenant(self, active: Active) -> ActiveAdapters:
        """What calls are served with while these are active. Raises UsageError as `activate`."""
        tenant, _ = self._prepared.get(active) or self._prepare(active)
        can_train = any(self.adapter(name).is_trainable for name, _ in active)
        return tenant if can_train == tenant.trainable else self._retrained(active, can_train)

    def check(self, active: Active) -> None:
        """Raise UsageError where these adapters cannot be activated; nothing is changed."""
        if active not in self._prepared:
            self._prepare(active)

    def refresh(self) -> None:
        """Look at every tensor again: they were moved or replaced."""
        if self.engine.recompute is not None:
            layers_become_regions(self.engine.model, self.host)
        self.engine.storage.refresh()
        self._prepared.clear()
        self._placed.clear()
        self.rows.clear()
        self.activate(self.active)

    def make_room(self, rank: int) -> None:
        """Let adapters of ranks up to this one take the place of others, without another graph for a compiler."""
        self.room = rank
        self._prepared.clear()
        self.activate(self.active)

    def enable(self, enabled: bool) -> None:
        """Whether the active adapters are used, or rest."""
        self.enabled = enabled
        self.activate(self.active)

    def copy_for(self, model: nn.Module, memo: dict[int, object]) -> "AdapterSet":
        """That of a deep copy of the model."""
        engine = self.engine.copy_for(model)
        base = self.base.copy_for(model, engine, memo)
        copied = AdapterSet(engine, model.get_submodule(BANK), base, enabled=self.enabled, regions=self.regions)
        copied.room = self.room
        if self.routed is not None:  # whose tensors were copied with the adapters'
            module = copied.bank._modules.get(ROUTE)
            copied.routed = self.routed if module is None else replace(self.routed, route=module)
        if self._holds is not None:
            if not self._holds():
                engine.forget()
            copied.watch()
        copied.activate(self.active)
        if engine.recompute is not None:
            layers_become_regions(model, copied.host)
        return copied

    def _forget(self, names: Sequence[str]) -> None:
        for name in names:
            self.bank._modules.pop(name, None)
            self.base.facts.tasks.pop(name, None)
            self.configs.pop(name, None)
            self.shown_configs.pop(name, None)
        gone = set(names)
        for active in [each for each in self._prepared if not gone.isdisjoint(name for name, _ in each)]:
            del self._prepared[active]
        if gone:
            self.engine.slots.clear()
            self.rows.forget(gone)
            self.inputs.clear()

    def _retrained(self, active: Active, trainable: bool) -> ActiveAdapters:
        """The same adapters where they can, or can no longer, be trained: another choice of lowerings."""
        if self.room:  # what is trained is read from where it is
            del self._prepared[active]
            self._prepare(active)
        before, bindings = self._prepared[active]
        tenant = replace(before, trainable=trainable, choices={}, regions={})
        self._prepared[active] = (tenant, bindings)
        return tenant

    def _prepare(self, active: Active) -> tuple[ActiveAdapters, Bindings]:
        adapters = [self.adapter(name) for name, _ in active]
        check_together(active, adapters)
        weights = [weight for _, weight in active]
        structure = structure_of([(each.plan, each.dtypes()) for each in adapters], weights)
        specialisation = self.engine.specialisation(structure)
        if (specialisation, self.regions) not in self._placed:
            become_regions(self.engine.model, self.host, structure, self.regions)
            self._placed.add((specialisation, self.regions))
        weighed = list(zip(adapters, weights, strict=True))

        tenant = tenant_of(specialisation, active, adapters)

        def bindings() -> Sequence[Binding]:
            instead = roomy(weighed, self.room) if self.room else None
            return self.engine.slots.bindings(weighed, instead)

        self._prepared[active] = tenant, cache(bindings)
        return self._prepared[active]
