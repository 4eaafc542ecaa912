"""What adapters put in front, as a value: what a file holds of a prompt that was computed."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from peftc.grammar.algebra import algebra
from peftc.grammar.method.rule import BoundParam, Init
from peftc.passes.expression.materialise import Evaluator, to_logical
from peftc.passes.expression.scene import Eager
from peftc.passes.plan.plan import AdapterPlan, ParamKey, PlannedSite

VALUE = "prompt"
"""The role of a prompt that is a value, and no longer computed."""


def settled_value(
    at: PlannedSite, tensors: Mapping[str, torch.Tensor], base: Callable[[str], torch.Tensor | None]
) -> torch.Tensor:
    """What is saved of a place's prompt as a value, over these tensors by role."""
    assert at.bound.settled is not None
    weight = base(at.site.weight)
    ops = Eager()
    values = Evaluator(
        ops,
        {role: tensor.detach() for role, tensor in tensors.items()},
        dict(at.bound.scalars),
        weight=None if weight is None else lambda: to_logical(ops, weight.detach(), at.site).float(),
    )
    with torch.no_grad():
        return values.of(at.bound.settled[0])


def settled(plan: AdapterPlan, keys: set[str]) -> AdapterPlan:
    """The plan for a file with these keys: a prompt of which it has only the value is one parameter."""
    sites = tuple(_settled(at, keys) for at in plan.sites)
    return plan if sites == plan.sites else replace(plan, sites=sites)


def _settled(at: PlannedSite, keys: set[str]) -> PlannedSite:
    bound = at.bound
    if bound.prompt is None or bound.settled is None:
        return at
    part, shape, key = bound.settled
    if key not in keys or any(each.saved in keys for each in bound.params if each.trained):
        return at

    def changed(matrix: algebra.Matrix) -> algebra.Matrix:
        return algebra.Param(VALUE) if matrix == part else algebra.rebuild(matrix, changed)

    prompt = changed(bound.prompt)
    nodes = [node for each in (prompt, bound.labels) if each is not None for node in algebra.walk(each)]
    read = {each.role for each in nodes if isinstance(each, algebra.Param)}
    kept = tuple(each for each in bound.params if each.role in read)
    value = BoundParam(VALUE, shape, Init("zeros"), key)
    return replace(at, bound=replace(bound, prompt=prompt, params=(value, *kept), drafts=(), settled=None))


def value_key(name: str, at: PlannedSite) -> ParamKey:
    """The key of what is saved as a value, which no tensor has."""
    return ParamKey(name, at.site.name, VALUE)
