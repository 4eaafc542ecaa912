"""Which modules may be regions of a model, and why each boundary is where it is."""

from collections.abc import Iterable, Mapping

from torch import nn

from peftc.grammar.diagnostics import UsageError, did_you_mean, fail
from peftc.grammar.spec.spec import REGIONS, Regions
from peftc.passes.plan.site import WHOLE
from peftc.passes.plan.structure import Structure
from peftc.passes.quantized.schemes.known import packed_modules
from peftc.runtime.execution.segments import layer_names
from peftc.runtime.regions.within import is_within, standing

DEFAULT: Regions = "layers"
"""Where regions begin if nobody says."""

ADAPTED, STORED = "adapted", "stores its weight packed"

INSIDE = ""
"""What is said of a module that is a region only where the one around it is split."""

_IN_FRONT = {
    "prompt": "virtual tokens in front of the text",
    "cache": "virtual tokens in front of the cache",
}


def checked(regions: object) -> Regions:
    """Where regions are to begin. Raises UsageError for what is no such place."""
    if regions not in REGIONS:
        help = did_you_mean(str(regions), REGIONS) or f"it is one of {', '.join(REGIONS)}"
        fail(UsageError, "E573", f"regions cannot be {regions!r}", help=help)
    return regions


def places(model: nn.Module, owners: Mapping[str, str], regions: Regions = DEFAULT) -> dict[str, str]:
    """The modules that may be regions: these, and what is around them up to a repeated layer.

    `owners` says of each what it is one for. Returns why each begins where it does, `INSIDE` for those within another.
    """
    layers = () if regions == "modules" else layer_names(model)
    found: dict[str, str] = {}
    for owner, what in owners.items():
        head = next((each for each in layers if is_within(owner, each)), owner)
        name = owner
        while True:
            found[name] = found.get(name, INSIDE) or (_because(head, what, layers, regions) if name == head else INSIDE)
            if name == head or not name:
                break
            name = name.rpartition(".")[0]
    return found


def _because(head: str, what: str, layers: tuple[str, ...], regions: Regions) -> str:
    if head in layers:
        stack = head.rpartition(".")[0]
        return f"a repeated layer{stack and f' of {stack}'}{'' if what == ADAPTED else ', with weights stored packed'}"
    asked = ', as regions = "modules" asks' if regions == "modules" else ""
    return f"{what}{asked or (', outside of repeated layers' if layers else '')}"


def why_whole(structure: Structure) -> str:
    """Why the model runs as one graph, whatever was asked: empty where it need not.

    What is active puts something in front of a text or cache, or into what the model itself holds.
    """
    for each in structure.fronts:
        if each.site.kind in WHOLE:
            return f"{_IN_FRONT[each.site.kind]} go into all of it"
    return "the model itself holds an adapted weight" if any(not at.site.user for at in structure.sites) else ""


def owners_of(model: nn.Module, structure: Structure) -> dict[str, str]:
    """The modules that graphs are for, and why: adapted weights are used in their forward, or theirs is stored packed.

    What is stored packed is computed with in the same way wherever it is, adapted or not.
    """
    found = dict.fromkeys(_adapted(model, structure), ADAPTED)
    return found | {name: found.get(name, STORED) for name in packed_modules(model)}


def _adapted(model: nn.Module, structure: Structure) -> Iterable[str]:
    """The modules in whose forward adapted weights are used."""
    names = [at.site.user for at in structure.sites]
    names += [copy.target.rpartition(".")[0] for copy in structure.copies]
    names += [each.module for each in structure.rows] + [each.site.module for each in structure.at("attention")]
    for name in dict.fromkeys(names):
        if standing(model, name) is None:  # taken out of the model since
            continue
        # A list of modules or of parameters has no forward: its parent uses what it holds.
        while name and type(model.get_submodule(name)).forward is nn.Module.forward:
            name = name.rpartition(".")[0]
        yield name
