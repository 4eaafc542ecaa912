"""Refuses what a spec would train and a model stores packed: there is no copy to make of it, and no row."""

from collections.abc import Iterable, Sequence

from peftc.grammar.diagnostics import SpecError, fail
from peftc.grammar.spec.select import Universe, select_modules
from peftc.grammar.spec.spec import AdapterSpec
from peftc.grammar.syntax import tree
from peftc.passes.plan.plan import PlannedCopy, PlannedRows
from peftc.passes.plan.resolve_copies import inside
from peftc.passes.plan.site import Site


def check_unpacked(
    spec: AdapterSpec,
    copies: Iterable[PlannedCopy],
    rows: Iterable[PlannedRows],
    sites: Sequence[Site],
    universe: Universe,
) -> None:
    """Raise SpecError if one of these copies or rows is of a weight that is stored packed."""
    packed = {site.module: site.packing for site in sites if site.packing is not None}
    if not packed:
        return
    whole = [each.module for each in copies if not each.is_bias]
    for name, packing in packed.items():
        if inside(name, whole):
            targets = spec.on if spec.rule.copies else ()
            clauses = (*spec.train, *(each for target in targets for each in target.selectors))
            span = next((each.span for each in clauses if inside(name, select_modules(each, universe))), None)
            message = f"{name} is quantized ({packing.label}), so it cannot be trained as a whole"
            help = "adapt it, for example with lora, or train what is not quantized; or load the base unquantized"
            fail(SpecError, "E224", message, span or spec.span, help)
    for each in rows:
        for name in each.modules:
            if name in packed:
                named = (clause for clause in spec.tokens if _names(clause.modules, name, universe))
                span = next((clause.span for clause in named), spec.span)
                message = f"{name} is quantized ({packed[name].label}), so none of its rows can be trained"
                help = "leave it out when you quantize, or leave these tokens out"
                fail(SpecError, "E224", message, span, help)


def _names(selectors: Iterable[tree.Selector], module: str, universe: Universe) -> bool:
    return any(module in select_modules(each, universe) for each in selectors)
