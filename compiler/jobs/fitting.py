"""check against a model: does a spec fit, without tracing anything."""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from peftc.compiler.jobs.drawing import as_found
from peftc.compiler.load_model.models import FoundModel
from peftc.compiler.load_model.quantizing import quantized_copy
from peftc.compiler.load_model.tokenizers import tokenizer_for
from peftc.compiler.report.facts import AdapterFacts
from peftc.compiler.report.summary import adapter_facts
from peftc.grammar.diagnostics import AdapterError, Diagnostic, ModelError, SpecError
from peftc.grammar.spec.spec import Base, Spec
from peftc.passes.plan.plan import AdapterPlan
from peftc.passes.plan.resolve import ModelSurvey, check_base, survey
from peftc.runtime.model.adding import plan_adapters
from peftc.runtime.model.weighted_plan import plan_combined


def check_fit(spec: Spec, model: nn.Module | FoundModel) -> tuple[tuple[AdapterFacts, ...], tuple[Diagnostic, ...]]:
    """What every adapter of a spec would put where on a model, and every diagnostic of those that do not fit."""
    found = as_found(model)
    ground = survey(found.model)
    problems = list(_base_problems(spec.base, ground))
    try:
        ground = survey(quantized_copy(found.model, spec.quantize))
    except (SpecError, ModelError) as error:
        problems += error.diagnostics
    weights = dict(spec.active)
    facts = []
    plans: dict[str, AdapterPlan] = {}
    for each in spec.adapters:
        try:
            tokenizer = tokenizer_for(replace(spec, adapters=(each,)), found)
            (plan,) = plan_adapters((each,), ground, tokenizer).plans
            facts.append(adapter_facts(plan, ground, {}, weights.get(each.name)))
            plans[each.name] = plan
        except SpecError as error:
            problems += error.diagnostics
    for combined in spec.combined:
        if not all(part.adapter in plans for part in combined.parts):
            continue  # what it is made of is among the problems
        try:
            plan = plan_combined(combined, plans, ground).plan
            facts.append(adapter_facts(plan, ground, {}, weights.get(combined.name)))
            plans[combined.name] = plan
        except AdapterError as error:
            problems += error.diagnostics
    return tuple(facts), tuple(problems)


def _base_problems(base: Base | None, ground: ModelSurvey) -> Iterator[Diagnostic]:
    for entry in base.entries if base else ():
        try:
            check_base(Base((entry,)), ground)
        except SpecError as error:
            yield from error.diagnostics
