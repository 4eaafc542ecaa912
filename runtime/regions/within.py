"""What the active adapters have inside of one module, under names that begin at it: alike layers have equal parts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from peftc.passes.plan.structure import (
    Structure,
    copy_slot,
    rows_slot,
    site_slot,
    storage_slot,
)

HEAD = "region"
"""What a region is called in its own graphs."""


@dataclass(frozen=True)
class Part:
    """The part of a structure inside of one module.

    `structure` has names below `HEAD`; `owners` maps the holders that graphs of it read to those of the whole model.
    """

    path: str
    structure: Structure
    owners: Mapping[str, str]

    def absolute(self, name: str) -> str:
        """A name below `HEAD` as the model has it."""
        return moved(name, HEAD, self.path)

    def owner(self, path: str) -> str:
        """The holder, in the model, of what a graph reads."""
        return self.owners.get(path) or self.absolute(path)


def moved(name: str, old: str, new: str) -> str:
    """A name below one module as it is below another; any other name stays."""
    if name == old:
        return new
    return f"{new}{name[len(old) :]}" if name.startswith(f"{old}.") else name


def is_within(name: str, path: str) -> bool:
    """Whether a name is that of a module or of something below it."""
    return not path or name == path or name.startswith(f"{path}.")


def part_of(structure: Structure, path: str) -> Part | None:
    """What of a structure is inside of the module of a path, or None where nothing is."""
    owners: dict[str, str] = {}
    sites = []
    for at in structure.sites:
        if not is_within(at.site.user, path):
            continue
        attention = None if at.site.attention is None else moved(at.site.attention, path, HEAD)
        own = replace(at.site, module=moved(at.site.module, path, HEAD), attention=attention, tied=(), output=False)
        sites.append(replace(at, site=own))
        for term in at.terms:
            owners[site_slot(term.position, own.name)] = site_slot(term.position, at.site.name)
        owners[storage_slot(own.module)] = storage_slot(at.site.module)
    copies = []
    for copy in structure.copies:
        if not is_within(copy.target, path):
            continue
        # What is copied may be around the module: then it has the module's name, and says what it stands for itself.
        around = is_within(path, copy.module)
        own_name = HEAD if around else moved(copy.module, path, HEAD)
        alias = moved(copy.target, path, HEAD) if around and copy.module != path else moved(copy.alias, path, HEAD)
        own_copy = replace(copy, module=own_name, alias=alias)
        copies.append(own_copy)
        owners[copy_slot(copy.position, own_copy.module)] = copy_slot(copy.position, copy.module)
    rows = []
    for each in structure.rows:
        if is_within(each.module, path):
            own_rows = replace(each, module=moved(each.module, path, HEAD), source=moved(each.source, path, HEAD))
            rows.append(own_rows)
            owners[rows_slot(each.position, own_rows.source)] = rows_slot(each.position, each.source)
    fronts = []
    for front in structure.at("attention"):
        if is_within(front.site.module, path):
            own_site = replace(front.site, module=moved(front.site.module, path, HEAD), layers=0)
            fronts.append(replace(front, site=own_site))
            owners[site_slot(front.term.position, own_site.name)] = site_slot(front.term.position, front.site.name)
    if not (sites or copies or rows or fronts):
        return None
    found = Structure(tuple(sites), tuple(copies), tuple(rows), tuple(fronts), structure.by_row, structure.gated)
    return Part(path, found, owners)


def standing(model: nn.Module, path: str) -> nn.Module | None:
    """The module of a path, or None where there is none any more."""
    module: nn.Module | None = model
    for part in filter(None, path.split(".")):
        module = None if module is None else module._modules.get(part)
    return module
