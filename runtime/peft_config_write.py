"""A plan as an adapter_config.json that PEFT reads to the same effect."""

import re
from collections.abc import Sequence

from peftc.grammar.diagnostics import CheckpointError, fail
from peftc.grammar.rule import Value
from peftc.passes.plan import AdapterPlan
from peftc.runtime import peft_fields as fields
from peftc.runtime.peft_names import minimal_endings, minimal_suffixes, suffixes, value_pattern
from peftc.runtime.peft_rule import constant, mapped_fields


def write_config(
    plan: AdapterPlan,
    *,
    module_names: Sequence[str],
    base_model_name_or_path: str | None,
    task_type: str | None,
    revision: str | None = None,
    inference_mode: bool = True,
) -> dict[str, object]:
    """The adapter_config.json with which PEFT adapts exactly the plan's sites, with the plan's values.

    `module_names` are all modules of the model. The task is left out where naming it would make PEFT train a head
    that the plan does not train.

    Raises:
        CheckpointError: the plan holds something PEFT's format has no words for.
    """
    rule = plan.spec.rule
    where = f"adapter {plan.name!r}"
    if not rule.peft_type:
        fail(CheckpointError, "E326", f"method '{rule.name}' has no form in PEFT's format", where=where)
    if plan.spec.tokens:
        fail(CheckpointError, "E326", "trainable tokens cannot be saved in PEFT's format yet", where=where)
    copied = [each.module for each in plan.copies if not each.is_bias]
    adapted = [each.site.name for each in plan.sites]
    kinds = {each.site.kind for each in plan.sites}
    endings = minimal_endings(copied, module_names, adapted)
    if endings is None:
        fail(
            CheckpointError,
            "E326",
            "PEFT's modules_to_save cannot name exactly the trained modules: it matches by the end of the name",
            help=f"trained here: {', '.join(copied)}",
            where=where,
        )
    if _trains_more(task_type, module_names, copied):
        task_type = None
    config: dict[str, object] = {
        "peft_type": rule.peft_type,
        "peft_version": fields.PEFT_VERSION,
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "revision": revision,
        "inference_mode": inference_mode,
        "target_modules": _module_targets(plan, module_names),
        "target_parameters": _parameter_targets(plan, module_names) or None,
        "modules_to_save": list(endings) or None,
        "bias": fields.only_adapter_bias(rule.peft_type) if plan.spec.bias == "adapter" else plan.spec.bias,
        "fan_in_fan_out": "conv1d" in kinds and "linear" not in kinds,
    }
    config.update(_written_values(plan, where))
    return config


def _module_targets(plan: AdapterPlan, module_names: Sequence[str]) -> list[str] | str:
    chosen = [each.site.module for each in plan.sites if each.site.kind != "parameter"]
    if not chosen:
        return [] if plan.sites else fields.NO_MODULES
    found = minimal_suffixes(chosen, module_names)
    return list(found) if found is not None else "|".join(re.escape(each) for each in chosen)


def _parameter_targets(plan: AdapterPlan, module_names: Sequence[str]) -> list[str]:
    chosen = {each.site.name: each.site for each in plan.sites if each.site.kind == "parameter"}
    # Which modules hold a parameter of that name is not known here, so every module counts as if it did.
    leaves = {site.leaf for site in chosen.values()}
    names = [f"{module}.{leaf}" for module in module_names for leaf in leaves]
    found: dict[str, None] = {}
    taken = {suffix for name in names if name not in chosen for suffix in suffixes(name)}
    for name in chosen:
        found[next((each for each in suffixes(name)[1:] if each not in taken), name)] = None
    return sorted(found)


def _written_values(plan: AdapterPlan, where: str) -> dict[str, object]:
    rule, written = plan.spec.rule, dict[str, object]()
    mapped = mapped_fields(rule)
    for name, expression in rule.peft_fields:
        if name not in mapped:
            written[name] = constant(expression)
            continue
        hyperparameter = mapped[name].name
        values = {each.site.name: _plain(dict(each.bound.values)[hyperparameter]) for each in plan.sites}
        if not values:
            written[name] = _plain(dict(plan.spec.values)[hyperparameter])
            continue
        written[name], exceptions = value_pattern(values)
        if not exceptions:
            continue
        pattern = fields.pattern_field(rule.peft_type, name)
        if pattern is None:
            sites = sorted(site for site, value in values.items() if value != written[name])
            fail(
                CheckpointError,
                "E326",
                f"PEFT's format holds one '{name}' for all modules, but '{hyperparameter}' differs between sites",
                help=f"{written[name]!r} at most of them, {values[sites[0]]!r} at '{sites[0]}'",
                where=where,
            )
        written[pattern] = exceptions
    return written


def _plain(value: Value) -> Value:
    """16.0 as 16: PEFT's ranks and alphas are written as whole numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _trains_more(task_type: str | None, module_names: Sequence[str], copied: Sequence[str]) -> bool:
    heads = fields.TASK_HEADS.get(task_type or "", ())
    return any(name.endswith(heads) for name in module_names if name not in copied) if heads else False
