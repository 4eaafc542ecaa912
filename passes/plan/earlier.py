"""A model as earlier releases of its library had it: under other names, its experts as single linears."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from peftc.grammar.spec.select import Universe
from peftc.passes.plan.resolve import ModelSurvey
from peftc.passes.plan.site import Site
from peftc.passes.plan.sites import candidates

WEIGHT = ".weight"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Slot:
    """A part of a stack of experts' weights: which expert's, and which of so many parts, one below the other."""

    site: str
    expert: int
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Today:
    """What an earlier tensor is now: one of that name, or a part of one; `others` has the names of all of its parts."""

    name: str
    slot: Slot | None = None
    others: Callable[[int, int], str] | None = None  # the earlier name, by expert and part


Names = Callable[[str], Today]
"""Today's place of a tensor with an earlier name."""


@dataclass(frozen=True)
class Earlier:
    """Earlier names: of modules, of linears that are a part of a stack, and of linears that are a bare parameter."""

    modules: Mapping[str, str] = field(default_factory=dict)
    slots: Mapping[str, Slot] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _before(self) -> Mapping[str, str]:
        return {today: name for name, today in self.modules.items()}

    def before(self, name: str) -> str:
        """The earlier name of a module of today, or of a tensor that a module of an earlier name holds."""
        owner, _, leaf = name.rpartition(".")
        found = self._before.get(name, "")
        return found or f"{self._before.get(owner, owner)}.{leaf}".lstrip(".")

    def __bool__(self) -> bool:
        return bool(self.modules or self.slots or self.weights)

    def site(self, name: str) -> str:
        """What a site of this earlier name is called today."""
        slot = self.slots.get(name)
        return self.weights.get(name, self.module(name)) if slot is None else slot.site

    def module(self, name: str) -> str:
        """What a module, or a tensor of it, of this earlier name is called today."""
        owner, rest = name, ""
        while owner:
            if owner in self.modules:
                return self.modules[owner] + rest
            owner, dot, leaf = owner.rpartition(".")
            rest = f"{dot}{leaf}{rest}"
        return name


def earlier_names(ground: ModelSurvey, tensors: Collection[str], names: Names, chosen: Collection[str]) -> Earlier:
    """What is called otherwise today, as far as these tensors, named as a file has them, are of it.

    What is so called in one layer is in all: a file that lacks some of it is then found to. `chosen` are the bare
    parameters that are chosen by their names of today.
    """
    known = set(ground.universe.modules)
    sites = {site.name: site for site in ground.sites}
    modules: dict[str, str] = {}
    slots: dict[str, Slot] = {}
    weights: dict[str, str] = {}
    for tensor in tensors:
        owner = tensor.rpartition(".")[0]
        if not owner or owner in slots or owner in modules or owner in weights:
            continue
        today = Today(owner + WEIGHT) if owner in known else names(tensor)
        if today.slot is not None and today.slot.site in sites:
            slots |= _all_slots(owner, today, sites, names)
        elif _is_bare(today.name, sites, chosen):
            weights |= _all_weights(owner, today.name, sites, names, chosen)
        elif owner not in known and today.name.rpartition(".")[0] in known:
            modules |= _all_modules(owner, today.name.rpartition(".")[0], known, names)
    return Earlier(modules, slots, weights)


def as_it_was(ground: ModelSurvey, earlier: Earlier) -> ModelSurvey:
    """The same model under its earlier names."""
    linears: dict[str, list[str]] = {}
    for name in (*earlier.slots, *earlier.weights):
        linears.setdefault(earlier.site(name), []).append(name)

    sites: list[Site] = []
    for site in ground.sites:
        if site.name in linears:
            sites += [_linear(site, name, earlier.slots.get(name)) for name in linears[site.name]]
        else:
            tied = tuple(map(earlier.before, site.tied))
            attention = None if site.attention is None else earlier.before(site.attention)
            module = earlier.before(site.module) if site.module else ""
            sites.append(replace(site, module=module, tied=tied, attention=attention))
    modules = dict.fromkeys(map(earlier.before, ground.universe.modules))
    for name in (*earlier.slots, *earlier.modules):
        modules |= dict.fromkeys(name[:end] for end, letter in enumerate(f"{name}.") if letter == ".")
    return replace(
        ground,
        sites=tuple(sites),
        universe=Universe(candidates(sites), tuple(modules)),
        tensors={earlier.before(name): each for name, each in ground.tensors.items()},
        ties={earlier.before(name): tuple(map(earlier.before, each)) for name, each in ground.ties.items()},
        embedding=earlier.before(ground.embedding),
        head=earlier.before(ground.head),
    )


def _linear(site: Site, name: str, slot: Slot | None) -> Site:
    rows = site.out_features // (1 if slot is None else slot.parts)
    return Site(name, "weight", "linear", rows, site.in_features, dtype=site.dtype, device=site.device)


def _all_modules(earlier: str, today: str, known: Collection[str], names: Names) -> dict[str, str]:
    """The modules under the same two prefixes, which the two names have before what they share."""
    old, new = earlier.split("."), today.split(".")
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    found = {earlier: today}
    inside = ".".join(new)
    for module in known:
        if not inside or f"{module}.".startswith(f"{inside}."):
            name = ".".join((*old, *module.split(".")[len(new) :])) if module else ""
            if name and name not in known and names(name + WEIGHT).name == module + WEIGHT:
                found[name] = module
    return found


def _all_slots(earlier: str, today: Today, sites: Mapping[str, Site], names: Names) -> dict[str, Slot]:
    """All parts of the stack that an earlier linear is a part of, and of those in other layers."""
    slot = today.slot
    assert slot is not None
    assert today.others is not None
    every = [today.others(expert, part) for expert in range(sites[slot.site].count) for part in range(slot.parts)]
    alike = [site for site in sites.values() if site.kind == "parameter" and _shape(site.name) == _shape(slot.site)]
    found: dict[str, Slot] = {}
    for site in alike:
        for name in every:
            other = _in_layer_of(name.removesuffix(WEIGHT), slot.site, site.name)
            place = names(other + WEIGHT).slot
            if place is not None and place.site == site.name and place.expert < site.count:
                found[other] = place
    return found or {earlier: slot}


def _is_bare(name: str, sites: Mapping[str, Site], chosen: Collection[str]) -> bool:
    """Whether this is a parameter of a module that is no linear today, and not chosen as what it is."""
    site = sites.get(name)
    return site is not None and site.kind == "parameter" and site.count == 1 and name not in chosen


def _all_weights(
    earlier: str, today: str, sites: Mapping[str, Site], names: Names, chosen: Collection[str]
) -> dict[str, str]:
    """The linears that are a bare weight today, in this layer and in others."""
    found = {earlier: today}
    for name in sites:
        if _shape(name) == _shape(today) and _is_bare(name, sites, chosen):
            other = _in_layer_of(earlier, today, name)
            if other + WEIGHT == name or names(other + WEIGHT).name == name:
                found[other] = name
    return found


def _shape(name: str) -> str:
    return _NUMBER.sub("#", name)


def _in_layer_of(name: str, site: str, other: str) -> str:
    """A name beside a site, as it is beside the same site of another layer: the numbers are put in place one by one."""
    numbers = iter(zip(_NUMBER.findall(site), _NUMBER.findall(other), strict=True))

    def put(match: re.Match[str]) -> str:
        own, its = next(numbers, (match[0], match[0]))
        return its if match[0] == own else match[0]

    return _NUMBER.sub(put, name)
