"""The plan of an adapter that is made of others: every site of theirs, and settings that one adapter can have."""

import re
from collections.abc import Sequence
from dataclasses import replace

from peftc.grammar.method.rule import MethodRule, Value
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.spec.spec import AdapterSpec, Target
from peftc.grammar.spec.values import complete
from peftc.grammar.syntax import tree
from peftc.passes.plan.plan import AdapterPlan
from peftc.passes.plan.resolve import ModelSurvey, resolve
from peftc.runtime.peft_config.peft_rule import listed_fields, mapped_fields


def plain_rule(rule: MethodRule) -> MethodRule:
    """The method of PEFT's type that starts from nothing but itself: how the adapters began is past."""
    alike = (each for each in builtin_methods().values() if each.peft_type == rule.peft_type)
    if all(each.trained for each in rule.params):
        return rule
    return next((each for each in alike if all(param.trained for param in each.params)), rule)


def planned(
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
