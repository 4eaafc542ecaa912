"""What an adapter inserts beside weights, told: in front, trained rows, trained copies."""

from collections.abc import Iterator

from peftc.compiler.report.facts import InsertedFacts
from peftc.compiler.report.summary import READ, listed
from peftc.grammar.algebra import algebra
from peftc.grammar.method.rule import COMPATIBLE
from peftc.passes.plan.plan import AdapterPlan, PlannedSite


def inserted(plan: AdapterPlan) -> tuple[InsertedFacts, ...]:
    """Everything of a plan that is no adapted weight, alike parts together."""
    return (*_fronts(plan), *_rows(plan), *_copies(plan))


def _fronts(plan: AdapterPlan) -> Iterator[InsertedFacts]:
    groups: dict[object, list[PlannedSite]] = {}
    for at in plan.sites:
        if at.bound.prompt is not None:
            groups.setdefault((at.site.kind, at.bound.values, at.front), []).append(at)
    for alike in groups.values():
        at = alike[0]
        bound, length = at.bound, at.front[-2]
        primes = {"prompt'": bound.prompt, "gate'": bound.gate, "labels'": bound.labels}
        used = {
            each.role
            for matrix in primes.values()
            if matrix is not None
            for each in algebra.walk(matrix)
            if isinstance(each, algebra.Param)
        }
        yield InsertedFacts(
            adapter=plan.name,
            kind=at.site.kind,
            sites=tuple(each.site.name for each in alike),
            says=_says(at, length),
            formulas={name: algebra.text(matrix) for name, matrix in primes.items() if matrix is not None},
            shapes={each.role: each.shape for each in bound.params if each.role in used},
        )


def _says(at: PlannedSite, length: int) -> str:
    tasks = f", for each of {at.front[0]} tasks" if len(at.front) > 2 else ""
    counted = ", which outputs count too" if dict(at.bound.values).get(COMPATIBLE) else ""
    if at.site.kind == "cache":
        numbers = f"{2 * at.site.layers} x {at.site.in_features} numbers each"
        return f"in front, those of {_counted(length, 'virtual token')}: {numbers}"
    if at.site.kind == "attention":
        return f"looks at {_counted(length, 'learned prompt')} too, through its own projections"
    return f"in front, {_counted(length, 'virtual token')}{tasks}{counted}"


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _rows(plan: AdapterPlan) -> Iterator[InsertedFacts]:
    groups: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for rows in plan.rows:
        groups.setdefault((rows.ids, rows.width), []).extend(rows.modules)
    for (ids, width), modules in groups.items():
        yield InsertedFacts(
            adapter=plan.name,
            kind="tokens",
            sites=tuple(modules),
            says=f"trained rows of {_counted(len(ids), 'token')}",
            formulas={f"W'{listed(ids)}": "rows"},
            shapes={"rows": (len(ids), width)},
        )


def _copies(plan: AdapterPlan) -> Iterator[InsertedFacts]:
    groups: dict[tuple[str, tuple[tuple[str, tuple[int, ...], bool], ...]], list[str]] = {}
    for copy in plan.copies:
        says = "trained biases of its own" if copy.is_bias else "a trained copy in its place"
        groups.setdefault((READ if copy.read else says, copy.tensors), []).append(copy.module)
    for (says, tensors), modules in groups.items():
        yield InsertedFacts(
            adapter=plan.name,
            kind="train",
            sites=tuple(modules),
            says=says,
            formulas={},
            shapes={name: shape for name, shape, _ in tensors},
        )
