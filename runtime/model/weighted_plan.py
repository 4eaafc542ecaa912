"""The plan of an adapter that is made of others: what can be combined, every site of theirs, and their settings."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn

from peftc.grammar.algebra import algebra
from peftc.grammar.diagnostics import AdapterError, ArgumentTypeError, SpecError, UsageError, fail
from peftc.grammar.method.rule import BoundRule, MethodRule, Value
from peftc.grammar.source import Span
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.spec.recipe import DENSE, JOINED, SUM, Recipe
from peftc.grammar.spec.spec import AdapterSpec, CombinedAdapter, Target
from peftc.grammar.spec.values import complete
from peftc.grammar.syntax import tree
from peftc.passes.foreign import peft as fields
from peftc.passes.plan.plan import AdapterPlan
from peftc.passes.plan.resolve import ModelSurvey, resolve
from peftc.runtime.peft_config.peft_rule import listed_fields, mapped_fields

_TOGETHER = "activate both at once instead, with a weight each if they can be weighted"


@dataclass(frozen=True)
class Combination:
    """An adapter made of others: its plan, the recipe as it is followed, and the rank of factors, 0 where there are
    vectors.
    """

    plan: AdapterPlan
    recipe: Recipe
    rank: int = 0


@dataclass(frozen=True)
class Factors:
    """The roles of the two factors in W' = W + scalar * (b @ a)."""

    scalar: str
    b: str
    a: str


def plan_combined(combined: CombinedAdapter, plans: Mapping[str, AdapterPlan], survey: ModelSurvey) -> Combination:
    """What a spec's combination of planned adapters is. Errors, as of `combination`, are told where the spec says it.

    Raises SpecError (E163) too: an option is not read by adapters of this kind.
    """
    parts: list[AdapterPlan] = []
    for part in combined.parts:
        if part.adapter not in plans:
            message, help = f"there is no adapter called '{part.adapter}'", f"the adapters are {', '.join(plans)}"
            fail(SpecError, "E146", message, part.span, help)
        parts.append(plans[part.adapter])
        with told_at(part.span):
            check_combinable(parts[-1])
    with told_at(combined.span):
        made = combination(parts, combined.name, combined.recipe, survey)
    idle = made.recipe.unread()
    if idle:
        message = f"'{idle[0]}' is not read here: '{parts[0].spec.rule.name}' has vectors, which are summed"
        fail(SpecError, "E163", message, combined.span, "leave it out")
    return made


def combination(parts: Sequence[AdapterPlan], name: str, recipe: Recipe, survey: ModelSurvey) -> Combination:
    """What adapters are, combined by a recipe that is sound in itself.

    Raises UsageError as `add_weighted_adapter` does, but for what takes a look at tensors.
    """
    for each in parts:
        check_combinable(each)
    vectors = [_is_of_vectors(each) for each in parts]
    if any(vectors) and not all(vectors):
        _refuse_mixture(parts)
    return _summed(parts, name, recipe, survey) if all(vectors) else _low_rank(parts, name, recipe, survey)


@contextmanager
def told_at(span: Span | None) -> Iterator[None]:
    """Inside, errors are told to be there, but for those that have a place."""
    try:
        yield
    except AdapterError as error:
        placed = (each if each.span else replace(each, span=span) for each in error.diagnostics)
        raise type(error)(*placed) from None


# --- what can be combined ---


def check_combinable(plan: AdapterPlan) -> None:
    """Raise UsageError (E582) where an adapter has what a combination would lose, or is of a method that has none."""
    rule, why = plan.spec.rule, ""
    held = next((at.site.name for at in plan.sites if at.site.kind == "parameter"), "")
    if any(at.bound.prompt is not None for at in plan.sites):
        fail(ArgumentTypeError, "E582", cannot(plan, f"'{rule.name}' puts virtual tokens in front"))
    if plan.copies:
        why = f"it trains its own {plan.copies[0].module}" + (".bias" if plan.copies[0].is_bias else " as a whole")
    elif plan.rows:
        why = f"it trains tokens of {plan.rows[0].module}"
    elif any(at.bound.tasks for at in plan.sites):
        why = "its weights are others for every task"
    elif held:
        why = f"it adapts the parameter {held}, which is no module"
    if why:
        fail(UsageError, "E582", cannot(plan, why), help=_TOGETHER)
    if not _is_of_vectors(plan):
        _check_factors(plan)


def _check_factors(plan: AdapterPlan) -> None:
    rule = plan.spec.rule
    if any(at.bound.bias is not None for at in plan.sites) and all(_parts(at.bound.weight) for at in plan.sites):
        fail(ArgumentTypeError, "E582", cannot(plan, f"'{rule.name}' has a bias of its own here"), help=_TOGETHER)
    known = mapped_fields(rule)
    if any(factors(at.bound) is None for at in plan.sites) or not {fields.RANK, fields.ALPHA} <= set(known):
        why = f"'{rule.name}' is neither a scaled product of two factors that PEFT knows, W + s * (B @ A), nor a vector"
        fail(ArgumentTypeError, "E582", cannot(plan, why), help=_TOGETHER)


def cannot(plan: AdapterPlan, why: str) -> str:
    """What is said of an adapter that is not combined."""
    return f"adapter {plan.name!r} cannot be combined with others: {why}"


def _is_of_vectors(plan: AdapterPlan) -> bool:
    return all(_is_vector(at.bound) for at in plan.sites)


def _is_vector(bound: BoundRule) -> bool:
    """Whether all that is adapted is a multiple of one parameter: then the sum of parameters is that of weights."""
    if len(bound.params) != 1 or not bound.params[0].trained or bound.prompt is not None:
        return False
    role = bound.params[0].role
    return all(each is None or _is_linear(each, role) for each in (bound.weight, bound.bias))


def _is_linear(matrix: algebra.Matrix, role: str) -> bool:
    """Whether the expression is a linear function of a parameter."""
    match matrix:
        case algebra.Param(own):
            return own == role
        case algebra.Hadamard(left, right) | algebra.Product(left, right):
            other = right if _is_linear(left, role) else left
            return _is_linear(left, role) != _is_linear(right, role) and algebra.Param(role) not in algebra.walk(other)
        case algebra.Scaled(_, operand) | algebra.Transposed(operand):
            return _is_linear(operand, role)
        case algebra.Function("reshape" | "tile" | "permute" | "slice" | "roll", (operand,)):
            return _is_linear(operand, role)
        case _:
            return False


def _parts(matrix: algebra.Matrix) -> Factors | None:
    match matrix:
        case algebra.Sum(algebra.Weight(), algebra.Scaled(scalar, algebra.Product(left, right))):
            b, a = (each.operand if isinstance(each, algebra.Dropped) else each for each in (left, right))
            if isinstance(b, algebra.Param) and isinstance(a, algebra.Param):
                return Factors(scalar, b.role, a.role)
    return None


def factors(bound: BoundRule) -> Factors | None:
    """The factors of what is W + s * (B @ A) and nothing else."""
    found = _parts(bound.weight)
    roles = {each.role for each in bound.params if each.trained and not each.shared}
    return found if found and bound.bias is None and roles == {found.b, found.a} and len(bound.params) == 2 else None


# --- plans ---


def _summed(parts: Sequence[AdapterPlan], name: str, recipe: Recipe, survey: ModelSurvey) -> Combination:
    rule = parts[0].spec.rule
    if any(each.spec.rule != rule for each in parts):
        _refuse_mixture(parts)
    if recipe.kind not in (SUM, DENSE):
        message = f"combination_type {recipe.kind!r} is for products of factors, and '{rule.name}' has vectors"
        fail(UsageError, "E581", message, help=f"leave it out, or say {SUM!r}: vectors are summed")
    plan = _planned(parts, name, rule, {}, survey)
    theirs = [{at.site.name: {each.role for each in at.bound.params} for at in part.sites} for part in parts]
    for at in plan.sites:
        (param,) = at.bound.params  # as the adapters have
        if any(param.role not in own.get(at.site.name, {param.role}) for own in theirs):
            message = f"the adapters do not scale the same at {at.site.name}: one its inputs, another its outputs"
            fail(UsageError, "E583", message, help="combine adapters whose settings agree there")
    return Combination(plan, replace(recipe, kind=SUM))


def _low_rank(parts: Sequence[AdapterPlan], name: str, recipe: Recipe, survey: ModelSurvey) -> Combination:
    if len({each.spec.rule.peft_type for each in parts}) > 1:
        _refuse_mixture(parts)
    # One adapter is its own sum, and exactly: PEFT combines it no other way.
    followed = replace(recipe, kind=SUM) if len(parts) == 1 else recipe
    rank = _rank(parts, followed)
    rule = _plain_rule(parts[0].spec.rule)
    known = mapped_fields(rule)
    values: dict[str, Value] = {known[fields.RANK].name: rank, known[fields.ALPHA].name: float(rank)}
    if fields.ROOT_SCALED in known:
        values[known[fields.ROOT_SCALED].name] = False
    return Combination(_planned(parts, name, rule, values, survey), followed, rank)


def _refuse_mixture(parts: Sequence[AdapterPlan]) -> NoReturn:
    told = " and ".join(dict.fromkeys(f"'{each.spec.rule.name}'" for each in parts))
    fail(ArgumentTypeError, "E582", f"adapters of {told} cannot be combined", help="activate them at once instead")


def _rank(parts: Sequence[AdapterPlan], recipe: Recipe) -> int:
    """The rank of the new adapter, the same everywhere. Raises UsageError where factors of different ones are added."""
    ranks = [_ranks(each) for each in parts]
    largest = [max(each.values()) for each in ranks]
    if recipe.kind == JOINED:
        return sum(largest)
    if recipe.is_dense:
        return recipe.rank or max(largest)
    help = "combine them by 'cat' or 'svd', which take different ranks"
    if len(set(largest)) > 1:
        told = ", ".join(f"{each.name!r} {rank}" for each, rank in zip(parts, largest, strict=True))
        message = f"combination_type {recipe.kind!r} adds factors, and the adapters' ranks differ: {told}"
        fail(UsageError, "E583", message, help=help)
    for site in dict.fromkeys(name for each in ranks for name in each):
        if len({each[site] for each in ranks if site in each}) > 1:
            message = f"combination_type {recipe.kind!r} adds factors, and the adapters' ranks differ at {site}"
            fail(UsageError, "E583", message, help=help)
    return largest[0]


def _ranks(plan: AdapterPlan) -> dict[str, int]:
    found: dict[str, int] = {}
    for at in plan.sites:
        own = factors(at.bound)
        assert own is not None
        found[at.site.name] = next(each.shape[0] for each in at.bound.params if each.role == own.a)
    return found


def _plain_rule(rule: MethodRule) -> MethodRule:
    """The method of PEFT's type that starts from nothing but itself: how the adapters began is past."""
    alike = (each for each in builtin_methods().values() if each.peft_type == rule.peft_type)
    if all(each.trained for each in rule.params):
        return rule
    return next((each for each in alike if all(param.trained for param in each.params)), rule)


def _planned(
    plans: Sequence[AdapterPlan], name: str, rule: MethodRule, settled: dict[str, Value], survey: ModelSurvey
) -> AdapterPlan:
    """A plan for every site of these adapters, with the first one's values but for those that are settled.

    What a file lists modules for differs between sites as it did.
    """
    first = plans[0].spec
    values = {**dict(complete(rule, ())), **_translated(first, rule), **settled}
    varied = set(listed_fields(rule).values())
    wanted: dict[str, dict[str, Value]] = {}
    for each in plans:
        for at in each.sites:
            own = dict(at.bound.values)
            wanted.setdefault(at.site.name, {**values, **{word: own[word] for word in varied & set(own)}})
    specs = [each.spec for each in plans]
    usual = AdapterSpec(name, rule, tuple(values.items()), strict=False)
    short = replace(usual, on=_union(specs, settled), skip=first.skip, refine=_refined(specs, settled))
    if all(each.skip == first.skip for each in specs):
        plan = resolve(short, survey)
        if {at.site.name: dict(at.bound.values) for at in plan.sites} == wanted:
            return plan
    groups: dict[tuple[tuple[str, Value], ...], list[tree.Selector]] = {}
    for site, own in wanted.items():
        other = tuple((each, value) for each, value in own.items() if value != values[each])
        groups.setdefault(other, []).append(tree.PatternSelector(re.escape(site)))
    exact = tuple(Target(tuple(selectors), overrides=other) for other, selectors in groups.items())
    return resolve(replace(usual, on=exact), survey)


def _translated(spec: AdapterSpec, rule: MethodRule) -> dict[str, Value]:
    """An adapter's values as another method of the same type calls them."""
    if spec.rule == rule:
        return dict(spec.values)
    ours, its = mapped_fields(rule), mapped_fields(spec.rule)
    return {ours[each].name: dict(spec.values)[its[each].name] for each in ours if each in its}


def _union(specs: Sequence[AdapterSpec], settled: dict[str, Value]) -> tuple[Target, ...]:
    """Every clause that chooses, once; none where all choose by default."""
    chosen = (_without(each, settled) for spec in specs for each in spec.on)
    return tuple(dict.fromkeys(chosen)) if all(each.on for each in specs) else ()


def _refined(specs: Sequence[AdapterSpec], settled: dict[str, Value]) -> tuple[Target, ...]:
    kept = (_without(each, settled) for spec in specs for each in spec.refine)
    return tuple(dict.fromkeys(each for each in kept if each.overrides))


def _without(target: Target, settled: dict[str, Value]) -> Target:
    return replace(target, overrides=tuple(each for each in target.overrides if each[0] not in settled))
