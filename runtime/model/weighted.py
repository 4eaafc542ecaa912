"""A new adapter made of others: what is asked is checked, planned and computed before anything is added."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from peftc.grammar.diagnostics import UsageError, fail
from peftc.grammar.spec.recipe import Recipe
from peftc.grammar.spec.spec import CombinedAdapter, Spec
from peftc.passes.expression.materialise import to_logical, to_stored
from peftc.passes.expression.scene import Eager
from peftc.passes.plan.plan import AdapterPlan, ParamKey
from peftc.passes.plan.site import Site
from peftc.runtime.adapted.adapted_module import AdaptedModule
from peftc.runtime.adapted.adapter_set import AdapterSet
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.merge.combine import Update, check, combined, mixed
from peftc.runtime.model.adding import FreshOptions, PlannedAdapters, Values, add_adapters, add_fresh
from peftc.runtime.model.weighted_plan import Combination, cannot, combination, factors, plan_combined, told_at

Weighed = Sequence[tuple[AdapterParameters, float]]


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
    check(recipe)
    made = combination([each.plan for each, _ in active], adapter_name, recipe, state.engine.backend.survey())
    for each in made.recipe.unread():
        kind = made.recipe.kind
        warnings.warn(f"{each} changes nothing: combination_type {kind!r} does not read it", stacklevel=2)
    _warn_undropped(made.recipe)
    _add(self, made, active)


def add_described(
    model: AdaptedModule, planned: PlannedAdapters, spec: Spec, options: FreshOptions, *, trainable: bool
) -> None:
    """Add a spec's fresh adapters, as planned, then those it has of others; what the spec activates is active.

    Raises as `add_fresh` and `add_combined`. On an error of a combination those that are made stay at rest.
    """
    if not spec.combined:
        add_fresh(model, planned, spec.active, options, trainable=trainable)
        return
    add_fresh(model, planned, None, options, trainable=trainable)
    for each in spec.combined:
        add_combined(model, each)
    model._adapter_state.activate(spec.active, trainable=trainable)


def add_combined(model: AdaptedModule, meant: CombinedAdapter) -> None:
    """Add an adapter that a spec has of others, as `add_weighted_adapter` does; it is at rest.

    Raises SpecError, or UsageError as that, with the place in the spec, and leaves the model as it was. An option that
    is not read is an error (E163).
    """
    state = model._adapter_state
    with told_at(meant.span):
        state.check_name(meant.name)
    made = plan_combined(meant, state.plans(), state.engine.backend.survey())
    with told_at(meant.span):
        check(meant.recipe)
        _warn_undropped(made.recipe)
        _add(model, made, [(state.adapter(each.adapter), each.weight) for each in meant.parts])


def _add(model: AdaptedModule, made: Combination, active: Weighed) -> None:
    state = model._adapter_state
    for adapter, _ in active:
        _check_finite(adapter)
    tensors = _low_rank(made, active) if made.rank else _summed(made, active)

    def values() -> Iterator[Values]:
        yield Values(given=tensors, upcast=False)

    add_adapters(model, PlannedAdapters((made.plan,)), values, lambda: state.base.own().value, None, trainable=False)


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


def _check_finite(adapter: AdapterParameters) -> None:
    for key, tensor in adapter.items():
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
            message = cannot(adapter.plan, f"'{key.role}' of {key.site} has values that are not finite")
            fail(UsageError, "E582", message, help="load it again from before it diverged")


def _warn_undropped(recipe: Recipe) -> None:
    if recipe.mix.dropped and recipe.density is not None and recipe.density >= 1:
        warnings.warn(f"nothing is dropped: density is {recipe.density}", stacklevel=3)


# --- vectors ---


def _summed(made: Combination, active: Weighed) -> dict[ParamKey, torch.Tensor]:
    """The weighted sums, at each site of the adapters that are there, as PEFT has it."""
    tensors = {}
    for at in made.plan.sites:
        (param,) = at.bound.params  # as the adapters have
        found = [(each.at_site(at.site.name), weight) for each, weight in active if at.site.name in each.planned]
        values = [own[param.role].detach().float() for own, _ in found]
        summed = mixed(values, [weight for _, weight in found], made.recipe)
        tensors[at.key(made.plan.name, param)] = summed.to(found[0][0][param.role].dtype)
    return tensors


# --- factors ---


def _low_rank(made: Combination, active: Weighed) -> dict[ParamKey, torch.Tensor]:
    if made.recipe.mix.dropped == "random":
        _draw_a_start(made.plan)
    tensors: dict[ParamKey, torch.Tensor] = {}
    for at in made.plan.sites:
        found, site = factors(at.bound), replace(at.site, scale=1.0)
        assert found is not None, "the rule is that of an adapter that has factors"
        scale = dict(at.bound.scalars)[found.scalar]
        stored, logical = (partial(each, Eager(), site=site) for each in (to_stored, to_logical))
        a, b = combined(_updates(active, at.site), made.recipe, made.rank, stored, logical)
        keys = {each.role: at.key(made.plan.name, each) for each in at.bound.params}
        tensors |= {keys[found.a]: a / scale, keys[found.b]: b}
    return tensors


def _draw_a_start(plan: AdapterPlan) -> None:
    """Draw what PEFT does for the new adapter before it fills it: the same seed is to drop the same numbers."""
    for at in plan.sites:
        found, start = factors(at.bound), dict(at.bound.values).get("init")
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
        found = None if at is None else factors(at.bound)
        if at is not None and found is not None:
            own = adapter.at_site(site.name)
            scale = dict(at.bound.scalars)[found.scalar]
            updates.append(Update(own[found.a].detach(), own[found.b].detach(), scale, weight))
    return updates
