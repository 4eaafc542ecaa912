"""A new adapter made of others: what is asked is checked, planned and computed before anything is added."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import torch

from peftc.grammar.algebra import algebra
from peftc.grammar.diagnostics import ArgumentTypeError, UsageError, fail
from peftc.grammar.method.rule import BoundRule, Value
from peftc.passes.expression.materialise import to_logical, to_stored
from peftc.passes.expression.scene import Eager
from peftc.passes.foreign import peft as fields
from peftc.passes.plan.plan import AdapterPlan, ParamKey
from peftc.passes.plan.resolve import ModelSurvey
from peftc.passes.plan.site import Site
from peftc.runtime.adapted.adapted_module import AdaptedModule
from peftc.runtime.adapted.adapter_set import AdapterSet
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.merge.combine import DENSE, JOINED, SUM, Recipe, Update, combined, mixed
from peftc.runtime.model.adding import PlannedAdapters, Values, add_adapters
from peftc.runtime.model.weighted_plan import plain_rule, planned
from peftc.runtime.peft_config.peft_rule import mapped_fields

Weighed = Sequence[tuple[AdapterParameters, float]]


@dataclass(frozen=True)
class Factors:
    """The roles of the two factors in W' = W + scalar * (b @ a)."""

    scalar: str
    b: str
    a: str


def add_weighted_adapter(
    self: AdaptedModule,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """Add an adapter made of others, each with a weight, as PEFT's method of that name.

    The adapters stay as they are. The new one adapts every site of any of them; where one of them is not, the
    others are combined. It is at rest, without gradients, until `set_adapter`, and saved, merged and loaded like any
    other.

    Adapters whose `W' = W + s * (B @ A)` (LoRA, and what starts otherwise and is LoRA from then on) are combined
    into one of scale one, of a single rank. With `w` the weights, and a negative one takes away:

    - `cat`: B and `w * s * A` side by side, which is exact; the rank is the sum of the ranks.
    - `svd`: the largest singular values of the exact sum; the rank is `svd_rank`, or the largest of the ranks.
    - `linear`: `sqrt(w * s)` times A and B each, summed. Of adapters of one rank; the products between different
      adapters' factors are no part of the exact sum. A single adapter is always combined so: then it is exact.
    - `magnitude_prune`, `dare_linear`: as `linear`, of factors in which only the share `density` of numbers is
      kept: the largest, or a random choice, enlarged in proportion.
    - `ties`, `dare_ties`: so, and of each number the mean of those whose sign has the majority.
    - `magnitude_prune_svd`, `dare_linear_svd`, `ties_svd`, `dare_ties_svd`: the same of whole updates
      `s * (B @ A)`, of which the largest singular values are kept. The rank is that of `svd`.

    Vectors that multiply a weight (IA3) are summed, `combination_type` left out or "linear".

    Args:
        adapters: names; one may occur twice.
        weights: a finite number for each.
        adapter_name: what the new one is called.
        combination_type: one of the above.
        svd_rank: the rank of the new adapter, from 1 on.
        svd_clamp: a quantile of the factors' numbers, from 0 to 1, beyond which they are cut off on both sides.
        svd_full_matrices: changes nothing: what full matrices have beyond reduced ones is never used, nor computed.
        svd_driver: torch.linalg.svd's, for adapters on CUDA.
        density: the share of numbers that is kept, for all but `cat`, `svd` and `linear`; from 1 on all are.
        majority_sign_method: how signs are elected: by the sum ("total") or by their count ("frequency").

    Raises:
        UsageError: the model stays as it was. The name is taken (E511). An adapter is unknown (E510), or they and
            the weights do not go together (E580); there is no such `combination_type` for them (E581); one of them
            cannot be combined: DoRA and all other methods, trained modules, biases and tokens, virtual tokens,
            parameters that are no module, different methods (E582); ranks differ where factors are summed (E583);
            a setting is missing or out of its range (E584). All but the first are ValueErrors too, or, for what a
            method cannot do, TypeErrors.
    """
    recipe = Recipe(combination_type, density, majority_sign_method, svd_rank, svd_clamp, svd_driver)
    state = self._adapter_state
    state.check_name(adapter_name, help="choose another adapter_name or delete it")
    active = _weighed(state, adapters, weights)
    recipe.check()
    for adapter, _ in active:
        _check_whole(adapter)
    survey = state.engine.backend.survey()
    if all(_is_vector(at.bound) for adapter, _ in active for at in adapter.plan.sites):
        plan, tensors = _summed(active, adapter_name, recipe, survey)
    else:
        for adapter, _ in active:
            _check_factors(adapter)
        plan, tensors = _low_rank(active, adapter_name, recipe, survey)

    def values() -> Iterator[Values]:
        yield Values(given=tensors, upcast=False)

    add_adapters(self, PlannedAdapters((plan,)), values, lambda: state.base.own().value, None, trainable=False)


# --- what is asked ---


def _weighed(state: AdapterSet, names: Sequence[str], weights: Sequence[float]) -> Weighed:
    if isinstance(names, str):
        fail(UsageError, "E580", f"adapters is the text {names!r}", help=f"give a list of names: [{names!r}]")
    try:
        found = [state.adapter(each) for each in names]
    except UsageError as error:
        raise UsageError(*error.diagnostics) from error
    if not found:
        fail(UsageError, "E580", "there is no adapter to combine", help="name at least one")
    if len(found) != len(weights):
        message = f"{len(found)} adapters are given {len(weights)} weights"
        fail(UsageError, "E580", message, help="give each adapter one weight")
    return [(each, _number(weight, each.plan.name)) for each, weight in zip(found, weights, strict=True)]


def _number(weight: object, name: str) -> float:
    try:
        value = float(weight)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        fail(UsageError, "E580", f"adapter {name!r} is given the weight {weight!r}", help="give it a number")
    return value


def _check_whole(adapter: AdapterParameters) -> None:
    """Raise UsageError where an adapter has what belongs to none but itself."""
    plan, rule, why = adapter.plan, adapter.plan.spec.rule, ""
    held = next((at.site.name for at in plan.sites if at.site.kind == "parameter"), "")
    if any(at.bound.prompt is not None for at in plan.sites):
        fail(ArgumentTypeError, "E582", _cannot(plan, f"'{rule.name}' puts virtual tokens in front"))
    if plan.copies:
        why = f"it trains its own {plan.copies[0].module}" + (".bias" if plan.copies[0].is_bias else " as a whole")
    elif plan.rows:
        why = f"it trains tokens of {plan.rows[0].module}"
    elif held:
        why = f"it adapts the parameter {held}, which is no module"
    if why:
        help = "activate both at once instead, with a weight each if they can be weighted"
        fail(UsageError, "E582", _cannot(plan, why), help=help)
    for key, tensor in adapter.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            message = _cannot(plan, f"'{key.role}' of {key.site} has values that are not finite")
            fail(UsageError, "E582", message, help="load it again from before it diverged")


def _check_factors(adapter: AdapterParameters) -> None:
    plan, rule = adapter.plan, adapter.plan.spec.rule
    help = "activate both at once instead, with a weight each if they can be weighted"
    if any(at.bound.bias is not None for at in plan.sites) and all(_parts(at.bound.weight) for at in plan.sites):
        fail(ArgumentTypeError, "E582", _cannot(plan, f"'{rule.name}' has a bias of its own here"), help=help)
    known = mapped_fields(rule)
    if any(_factors(at.bound) is None for at in plan.sites) or not {fields.RANK, fields.ALPHA} <= set(known):
        why = f"'{rule.name}' is neither a scaled product of two factors that PEFT knows, W + s * (B @ A), nor a vector"
        fail(ArgumentTypeError, "E582", _cannot(plan, why), help=help)


def _cannot(plan: AdapterPlan, why: str) -> str:
    return f"adapter {plan.name!r} cannot be combined with others: {why}"


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


def _factors(bound: BoundRule) -> Factors | None:
    """The factors of what is W + s * (B @ A) and nothing else."""
    found = _parts(bound.weight)
    roles = {each.role for each in bound.params if each.trained and not each.shared}
    return found if found and bound.bias is None and roles == {found.b, found.a} and len(bound.params) == 2 else None


def _followed(recipe: Recipe, kind: str) -> Recipe:
    """The recipe as it is followed; what it does not read of what was given, or reads without effect, is said."""
    followed = replace(recipe, kind=kind)
    for each in followed.unread():
        warnings.warn(f"{each} changes nothing: combination_type {followed.kind!r} does not read it", stacklevel=4)
    if followed.mix.dropped and followed.density is not None and followed.density >= 1:
        warnings.warn(f"nothing is dropped: density is {followed.density}", stacklevel=4)
    return followed


# --- vectors ---


def _summed(
    active: Weighed, name: str, recipe: Recipe, survey: ModelSurvey
) -> tuple[AdapterPlan, dict[ParamKey, torch.Tensor]]:
    """One whose parameters are the weighted sums, at each site of the adapters that are there, as PEFT has it."""
    rule = active[0][0].plan.spec.rule
    if any(each.plan.spec.rule != rule for each, _ in active):
        _refuse_mixture(active)
    if recipe.kind not in (SUM, DENSE):
        message = f"combination_type {recipe.kind!r} is for products of factors, and '{rule.name}' has vectors"
        fail(UsageError, "E581", message, help=f"leave it out, or say {SUM!r}: vectors are summed")
    plain = _followed(recipe, SUM)
    plan = planned([each.plan for each, _ in active], name, rule, {}, survey)
    tensors = {}
    for at in plan.sites:
        (param,) = at.bound.params  # as the adapters have
        found = [(each.at_site(at.site.name), weight) for each, weight in active if at.site.name in each.planned]
        if any(param.role not in own for own, _ in found):
            message = f"the adapters do not scale the same at {at.site.name}: one its inputs, another its outputs"
            fail(UsageError, "E583", message, help="combine adapters whose settings agree there")
        made = mixed([own[param.role].detach().float() for own, _ in found], [weight for _, weight in found], plain)
        tensors[at.key(name, param)] = made.to(found[0][0][param.role].dtype)
    return plan, tensors


# --- factors ---


def _low_rank(
    active: Weighed, name: str, recipe: Recipe, survey: ModelSurvey
) -> tuple[AdapterPlan, dict[ParamKey, torch.Tensor]]:
    kinds = {each.plan.spec.rule.peft_type for each, _ in active}
    if len(kinds) > 1:
        _refuse_mixture(active)
    # One adapter is its own sum, and exactly: PEFT combines it no other way.
    followed = _followed(recipe, SUM if len(active) == 1 else recipe.kind)
    rank = _rank(active, followed)
    rule = plain_rule(active[0][0].plan.spec.rule)
    known = mapped_fields(rule)
    values: dict[str, Value] = {known[fields.RANK].name: rank, known[fields.ALPHA].name: float(rank)}
    if fields.ROOT_SCALED in known:
        values[known[fields.ROOT_SCALED].name] = False
    plan = planned([each.plan for each, _ in active], name, rule, values, survey)
    if followed.mix.dropped == "random":
        _draw_a_start(plan)
    tensors: dict[ParamKey, torch.Tensor] = {}
    for at in plan.sites:
        found, site = _factors(at.bound), replace(at.site, scale=1.0)
        assert found is not None, "the rule is that of an adapter that has factors"
        scale = dict(at.bound.scalars)[found.scalar]
        stored, logical = (partial(each, Eager(), site=site) for each in (to_stored, to_logical))
        a, b = combined(_updates(active, at.site), followed, rank, stored, logical)
        keys = {each.role: at.key(name, each) for each in at.bound.params}
        tensors |= {keys[found.a]: a / scale, keys[found.b]: b}
    return plan, tensors


def _draw_a_start(plan: AdapterPlan) -> None:
    """Draw what PEFT does for the new adapter before it fills it: the same seed is to drop the same numbers."""
    for at in plan.sites:
        found, start = _factors(at.bound), dict(at.bound.values).get("init")
        assert found is not None
        shapes = {each.role: each.shape for each in at.bound.params}
        a, b = torch.empty(shapes[found.a]), torch.empty(shapes[found.b])
        is_embedding = at.site.kind == "embedding"
        for each in (a, b):
            each.normal_() if is_embedding else each.uniform_()
        if start != "random":  # and once more, as the adapter is to start
            b.normal_() if is_embedding else a.normal_() if start == "gaussian" else a.uniform_()


def _updates(active: Weighed, site: Site) -> list[Update]:
    updates = []
    for adapter, weight in active:
        at = adapter.planned.get(site.name)
        found = None if at is None else _factors(at.bound)
        if at is not None and found is not None:
            own = adapter.at_site(site.name)
            scale = dict(at.bound.scalars)[found.scalar]
            updates.append(Update(own[found.a].detach(), own[found.b].detach(), scale, weight))
    return updates


def _rank(active: Weighed, recipe: Recipe) -> int:
    """The rank of the new adapter, the same everywhere. Raises UsageError where factors of different ones are added."""
    ranks = [_ranks(adapter) for adapter, _ in active]
    largest = [max(each.values()) for each in ranks]
    if recipe.kind == JOINED:
        return sum(largest)
    if recipe.is_dense:
        return recipe.rank or max(largest)
    help = "combine them by 'cat' or 'svd', which take different ranks"
    if len(set(largest)) > 1:
        told = ", ".join(f"{each.plan.name!r} {rank}" for (each, _), rank in zip(active, largest, strict=True))
        message = f"combination_type {recipe.kind!r} adds factors, and the adapters' ranks differ: {told}"
        fail(UsageError, "E583", message, help=help)
    for site in dict.fromkeys(name for each in ranks for name in each):
        if len({each[site] for each in ranks if site in each}) > 1:
            message = f"combination_type {recipe.kind!r} adds factors, and the adapters' ranks differ at {site}"
            fail(UsageError, "E583", message, help=help)
    return largest[0]


def _ranks(adapter: AdapterParameters) -> dict[str, int]:
    found: dict[str, int] = {}
    for at in adapter.plan.sites:
        factors = _factors(at.bound)
        assert factors is not None
        found[at.site.name] = next(each.shape[0] for each in at.bound.params if each.role == factors.a)
    return found


def _refuse_mixture(active: Weighed) -> NoReturn:
    told = " and ".join(dict.fromkeys(f"'{each.plan.spec.rule.name}'" for each, _ in active))
    fail(UsageError, "E582", f"adapters of {told} cannot be combined", help="activate them at once instead")
