"""The adapters of one model: which there are, which are active."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from peftc.grammar.diagnostics import ModelError, UsageError, did_you_mean, fail
from peftc.grammar.spec.spec import Regions
from peftc.passes.foreign import transformers as contract
from peftc.passes.ir.emit import fake_like
from peftc.passes.plan.plan import IDS, ORDER, ROWS, AdapterPlan, ParamKey
from peftc.passes.plan.structure import structure_of
from peftc.runtime.adapted.base_weights import Active, BaseWeights, base_view
from peftc.runtime.adapted.by_row import RowAdapters
from peftc.runtime.adapted.together import check_together
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.adapters.room import roomy
from peftc.runtime.adapters.slots import Binding, sources
from peftc.runtime.base.overlay import BANK
from peftc.runtime.base.replaced import Replaced
from peftc.runtime.execution.engine import ActiveAdapters, Engine, Specialisation
from peftc.runtime.execution.virtual import Owner, Virtual
from peftc.runtime.regions.host import Host
from peftc.runtime.regions.kinds import attached, mixed
from peftc.runtime.regions.modules import become_regions, layers_become_regions, renew_regions
from peftc.runtime.regions.outline import partition_of
from peftc.runtime.regions.partition import Partition
from peftc.runtime.regions.places import DEFAULT, why_whole
from peftc.runtime.regions.watch import Holds
from peftc.runtime.regions.whole import watch_whole

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
    configs: dict[str, tuple[AdapterPlan, Any]] = field(default_factory=dict)  # PEFT's, as they were asked for
    shown_configs: dict[str, Any] = field(default_factory=dict)  # what `peft_config` gives: always this very one
    room: int = 0  # the rank up to which another adapter fits into what a compiler has
    _holds: Holds | None = None  # whether the model is as graphs of the whole were made for
    _prepared: dict[Active, tuple[ActiveAdapters, Bindings]] = field(default_factory=dict)
    _placed: set[tuple[Specialisation, Regions]] = field(default_factory=set)  # whose modules are regions

    def __post_init__(self) -> None:
        self.host = Host(self.engine)
        self.rows = RowAdapters(self)
        self.engine.when_reset.append(self.host.reset)
        self.host.renew = self._renew

    def __reduce__(self) -> Any:
        """Without programs, and not yet activated: see `AdaptedModule.__setstate__`."""
        state = {"active": self.active, "enabled": self.enabled, "regions": self.regions, "room": self.room}
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
            known = tuple(self.bank._modules)
            help = did_you_mean(name, known) or (f"the adapters are {', '.join(known)}" if known else "there is none")
            fail(UsageError, "E510", f"there is no adapter {name!r}", help=help)
        return found

    def names(self) -> tuple[str, ...]:
        """All adapters, in the order they were added."""
        return tuple(self.bank._modules)

    def plans(self) -> dict[str, AdapterPlan]:
        """Every adapter's plan."""
        return {name: self.adapter(name).plan for name in self.names()}

    def check_name(self, name: str, help: str = "choose another name or delete it") -> None:
        """Raise UsageError if no adapter can be added under this name."""
        if name in self.bank._modules:
            fail(UsageError, "E511", f"there already is an adapter {name!r}", help=help)
        if hasattr(self.bank, name):  # the adapters are modules, and reached by their names
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

    def remove(self, name: str) -> None:
        """Take an adapter away; if it was active, the others that were stay active."""
        self.adapter(name)
        self._forget([name])
        self.activate(tuple(each for each in self.active if each[0] != name))

    def replace(self, name: str, adapter: AdapterParameters) -> None:
        """Put an adapter in the place of one, active as that is. Raises UsageError, and changes nothing, as `check`."""
        others = [adapter if each == name else self.adapter(each) for each, _ in self.active]
        check_together(self.active, others)
        order = self.names()
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
        chosen = {name for name, _ in active}
        self.active = active
        if trainable is not None:
            for name, adapter in self.bank._modules.items():
                assert isinstance(adapter, AdapterParameters)
                if name in chosen or not adapter.frozen or adapter.is_trainable:
                    adapter.train_only(trainable and name in chosen)
            for name in chosen:
                self.adapter(name).frozen = not trainable
        if self.enabled and not self.displaced:
            self.engine.activate(self.tenant(active), self._prepared[active][1])
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

        def lookup(position: int, site: str, role: str) -> torch.Tensor:
            adapter = adapters[position]
            return adapter.at_site(site)[role]

        def slot_value(position: int, site: str, role: str, near: fx.Node) -> torch.Tensor:
            if role in (ROWS, IDS, ORDER):
                own = adapters[position].tensor(ParamKey(adapters[position].plan.name, site, role))
                return fake_like(own.shape, own.dtype, near)
            tensors = adapters[position].at_site(site)
            if role in tensors:
                return fake_like(tensors[role].shape, tensors[role].dtype, near)
            kinds = [each.dtype for each in tensors.values() if each.is_floating_point()]
            return fake_like((), kinds[0] if kinds else torch.float32, near)

        penalties = tuple(each.penalty for each in adapters if each.allocator is not None)
        virtual = Virtual(specialisation.structure.fronts, owner=Owner(active, adapters))
        tenant = ActiveAdapters(
            specialisation,
            slot_value,
            lookup,
            penalties=penalties,
            virtual=virtual,
            sources=cache(lambda: sources(weighed)),
            holders=cache(lambda: [each for adapter in adapters for each in adapter.modules()]),
        )

        def bindings() -> Sequence[Binding]:
            instead = roomy(weighed, self.room) if self.room else None
            return self.engine.slots.bindings(weighed, instead)

        self._prepared[active] = tenant, cache(bindings)
        return self._prepared[active]
