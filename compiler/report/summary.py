"""A plan told by the clauses of its spec."""

from collections.abc import Mapping, Sequence

import torch

from peftc.compiler.report.facts import AdapterFacts, RuleFacts
from peftc.grammar.method.rule import MethodRule, Value
from peftc.grammar.spec.select import select
from peftc.grammar.spec.spec import AdapterSpec, Spec, Target
from peftc.grammar.spec.values import complete
from peftc.grammar.spec.write import to_tree
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.layout import lay_out
from peftc.passes.plan.plan import AdapterPlan, PlannedRows
from peftc.passes.plan.resolve import ModelSurvey

SHOWN = 8  # ids of tokens that a table names
READ = "embeddings of its own, from its file"


def adapter_facts(
    plan: AdapterPlan, ground: ModelSurvey, tensors: Mapping[str, torch.Tensor], weight: float | None
) -> AdapterFacts:
    """What an adapter does where, clause by clause."""
    return AdapterFacts(
        name=plan.name,
        method=plan.spec.rule.name,
        rules=(*_site_rules(plan, ground), *_copy_rules(plan), *_rows_rules(plan)),
        parameters=plan.parameter_count,
        bytes=sum(each.numel() * each.element_size() for each in tensors.values()),
        weight=weight,
    )


def _site_rules(plan: AdapterPlan, ground: ModelSurvey) -> list[RuleFacts]:
    clauses = _clauses(plan.spec)
    on = list(zip(clauses[tree.OnClause], plan.spec.on, strict=True))
    refine = list(zip(clauses[tree.RefineClause], plan.spec.refine, strict=True))
    chosen_by = {name: text for text, target in on for name in _chosen(target, ground)}
    refined_by = {name: text for text, target in refine for name in _chosen(target, ground)}
    groups: dict[tuple[str, tuple[tuple[str, Value], ...]], list[tuple[str, int]]] = {}
    for at in plan.sites:
        name = at.site.name
        text = chosen_by.get(name, f"the default of {plan.spec.rule.name}")
        if name in refined_by:
            text += f"; {refined_by[name]}"
        groups.setdefault((text, at.bound.values), []).append((name, at.parameter_count))
    return [
        RuleFacts(
            rule=text,
            sites=tuple(name for name, _ in sites),
            values=dict(values),
            brief=brief(plan.spec.rule, dict(values)),
            parameters=sum(count for _, count in sites),
        )
        for (text, values), sites in groups.items()
    ]


def _copy_rules(plan: AdapterPlan) -> list[RuleFacts]:
    groups: dict[str, list[tuple[str, int]]] = {}
    clauses = _clauses(plan.spec)
    for copy in plan.copies:
        text = f"bias {plan.spec.bias}" if copy.is_bias else "; ".join(clauses[tree.TrainClause])
        text = READ if copy.read else text
        groups.setdefault(text, []).append((copy.module, copy.parameter_count))
    return [
        RuleFacts(text, tuple(name for name, _ in modules), {}, "", sum(count for _, count in modules))
        for text, modules in groups.items()
    ]


def _rows_rules(plan: AdapterPlan) -> list[RuleFacts]:
    groups: dict[tuple[int, ...], list[PlannedRows]] = {}
    for rows in plan.rows:
        groups.setdefault(rows.ids, []).append(rows)
    return [
        RuleFacts(
            f"tokens {listed(ids)}",
            tuple(module for each in alike for module in each.modules),
            {},
            "",
            sum(each.parameter_count for each in alike),
        )
        for ids, alike in groups.items()
    ]


def listed(ids: Sequence[int]) -> str:
    """Ids of tokens, the first few."""
    return f"[{', '.join(map(str, ids[:SHOWN]))}{', ...' if len(ids) > SHOWN else ''}]"


def brief(rule: MethodRule, values: Mapping[str, Value]) -> str:
    """The sizes among the hyperparameters, and what is not the method's default: `rank = 8, alpha = 16`."""
    defaults = dict(complete(rule, ()))
    sizes = {each.name for each in rule.hyperparameters if each.type == "int"}
    shown = {
        name: value
        for name, value in values.items()
        if value != defaults[name] or (name in sizes and value is not None)
    }
    return ", ".join(f"{name} = {_short(value)}" for name, value in shown.items())


def _short(value: Value) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case tuple():
            return f"[{', '.join(map(str, value))}]"
        case _:
            return str(value)


def _clauses(spec: AdapterSpec) -> dict[type[tree.Node], list[str]]:
    """The canonical text of every clause, by kind and in order."""
    found: dict[type[tree.Node], list[str]] = {
        kind: [] for kind in (tree.OnClause, tree.RefineClause, tree.SkipClause, tree.TrainClause)
    }
    adapter = to_tree(Spec((spec,))).statements[-1]
    for unit in lay_out(adapter):
        if unit.node is not None and type(unit.node) in found:
            found[type(unit.node)].append(" ".join(" ".join(unit.lines).split()))
    return found


def _chosen(target: Target, ground: ModelSurvey) -> list[str]:
    return [each.name for selector in target.selectors for each in select(selector, target.where, ground.universe)]
