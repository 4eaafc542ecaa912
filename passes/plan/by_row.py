"""One structure for calls whose rows have adapters of their own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from peftc.passes.plan.site import Site
from peftc.passes.plan.structure import (
    AdaptedSite,
    CopiedTensor,
    ReplacedRows,
    Structure,
    Term,
    copy_slot,
    rows_slot,
    site_slot,
)


@dataclass(frozen=True)
class ByRow:
    """The structure of several choices, of which every row of a call has one.

    `owners` are, for each choice, the slots it has of the structure, and what these are when it is active alone.
    """

    structure: Structure
    owners: tuple[Mapping[str, str], ...]


def by_row(choices: Sequence[Structure]) -> ByRow:
    """Put the structures of choices, none of which has virtual tokens, into one.

    At a site those with equal terms share a lane, whatever their tensors are; so do those that replace a tensor.
    """
    owners: tuple[dict[str, str], ...] = tuple({} for _ in choices)
    structure = Structure(_sites(choices, owners), _copies(choices, owners), _rows(choices, owners), by_row=True)
    return ByRow(structure, owners)


def _sites(choices: Sequence[Structure], owners: Sequence[dict[str, str]]) -> tuple[AdaptedSite, ...]:
    sites: dict[str, Site] = {}
    lanes: dict[str, dict[tuple[Term, ...], list[tuple[int, AdaptedSite]]]] = {}
    for number, structure in enumerate(choices):
        for at in structure.sites:
            sites.setdefault(at.site.name, at.site)
            kind = tuple(replace(term, position=0) for term in at.terms)
            lanes.setdefault(at.site.name, {}).setdefault(kind, []).append((number, at))
    return tuple(AdaptedSite(site, *_lanes(name, lanes[name], owners)) for name, site in sites.items())


def _lanes(
    name: str, found: Mapping[tuple[Term, ...], list[tuple[int, AdaptedSite]]], owners: Sequence[dict[str, str]]
) -> tuple[tuple[Term, ...], tuple[int, ...]]:
    terms: list[Term] = []
    for kind, members in found.items():
        for place, term in enumerate(kind):
            for number, at in members:
                owners[number][site_slot(len(terms), name)] = site_slot(at.terms[place].position, name)
            terms.append(replace(term, position=len(terms)))
    return tuple(terms), tuple(map(len, found))


def _copies(choices: Sequence[Structure], owners: Sequence[dict[str, str]]) -> tuple[CopiedTensor, ...]:
    made: dict[str, CopiedTensor] = {}
    for copy, number in _numbered(structure.copies for structure in choices):
        made.setdefault(copy.target, replace(copy, position=0))
        owners[number][copy_slot(0, copy.module)] = copy_slot(copy.position, copy.module)
    return tuple(made.values())


def _rows(choices: Sequence[Structure], owners: Sequence[dict[str, str]]) -> tuple[ReplacedRows, ...]:
    made: dict[tuple[str, int], ReplacedRows] = {}
    for number, structure in enumerate(choices):
        count: dict[str, int] = {}
        for each in structure.rows:
            place = count[each.module] = count.get(each.module, -1) + 1
            made.setdefault((each.module, place), replace(each, position=place))
            owners[number][rows_slot(place, each.source)] = rows_slot(each.position, each.source)
    return tuple(made.values())


def _numbered(found: Iterator[Sequence[CopiedTensor]]) -> Iterator[tuple[CopiedTensor, int]]:
    for number, copies in enumerate(found):
        for each in copies:
            yield each, number
