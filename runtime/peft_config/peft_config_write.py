"""A plan as an adapter_config.json: one that PEFT reads to the same effect, where PEFT has the method."""

import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

from peftc.grammar.diagnostics import CheckpointError, fail
from peftc.grammar.method.peft_item import translated
from peftc.grammar.method.rule import LAST, Value
from peftc.passes.foreign import peft as fields
from peftc.passes.plan.plan import AdapterPlan, PlannedSite
from peftc.passes.plan.site import HELD, WHOLE, Site
from peftc.runtime.peft_config.peft_rule import (
    constant_fields,
    decided_fields,
    listed_fields,
    mapped_fields,
    pattern_fields,
    placed_fields,
    tokens_field,
)
from peftc.runtime.peft_config.spec_config import spec_fields
from peftc.runtime.peft_format.peft_names import minimal_endings, minimal_suffixes, suffixes, value_pattern


def write_config(
    plan: AdapterPlan,
    *,
    module_names: Sequence[str],
    base_model_name_or_path: str | None,
    task_type: str | None,
    auto_mapping: Mapping[str, str] | None = None,
    revision: str | None = None,
    inference_mode: bool = True,
) -> dict[str, object]:
    """The adapter_config.json with which PEFT adapts exactly the plan's sites, with the plan's values.

    A method without a PEFT type has one of our own format, with the spec's text in it.

    `module_names` are all modules of the model. The task is left out where naming it would make PEFT train a head
    that the plan does not train; then `auto_mapping`, if given, says of which class the base is.

    Raises:
        CheckpointError: the plan holds something PEFT's format has no words for.
    """
    rule = plan.spec.rule
    where = f"adapter {plan.name!r}"
    if rule.peft_type == fields.OWN_TYPE:
        message = f"'{rule.name}' says it is PEFT's type {rule.peft_type}, which means a method that PEFT has not"
        fail(CheckpointError, "E326", message, help="leave its 'peft' item out", where=where)
    if not rule.peft_type:
        return {
            **spec_fields(plan.spec),
            "task_type": task_type,
            "base_model_name_or_path": base_model_name_or_path,
            "revision": revision,
            "inference_mode": inference_mode,
        }
    copied = [each.module for each in plan.trained if not each.is_bias and not each.saved]
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
    if rule.prompt is not None:
        # Without a task PEFT leaves prompts out, and with one it trains a head.
        task = "FEATURE_EXTRACTION" if _trains_more(task_type, module_names, copied) else task_type
        trained = _with_heads(endings, task)
        config = _front_config(plan, base_model_name_or_path, task, revision, inference_mode, trained, where)
        return _as_known(config, auto_mapping)
    if _trains_more(task_type, module_names, copied):
        task_type = None
    config = {
        "peft_type": rule.peft_type,
        "peft_version": fields.PEFT_VERSION,
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "revision": revision,
        "inference_mode": inference_mode,
        "target_modules": _module_targets(plan, module_names),
        "target_parameters": _parameter_targets(plan, module_names) or None,
        "modules_to_save": list(_with_heads(endings, task_type)) or None,
        "bias": fields.only_adapter_bias(rule.peft_type) if plan.spec.bias == "adapter" else plan.spec.bias,
        "fan_in_fan_out": "conv1d" in kinds and "linear" not in kinds,
    }
    config.update(_listed(plan, module_names))
    config.update(_written_values(plan, where))
    config.update(_tokens(plan, module_names, where))
    config.update(_ties(plan, where))
    return _as_known(config, auto_mapping)


def _as_known(config: Mapping[str, object], auto_mapping: Mapping[str, str] | None) -> dict[str, object]:
    """What PEFT's config class of the type has, as far as it suffices."""
    kind = str(config["peft_type"])
    named = {"auto_mapping": dict(auto_mapping)} if auto_mapping and config["task_type"] is None else {}
    return {**{name: each for name, each in config.items() if fields.is_written(kind, name, each)}, **named}


def _ties(plan: AdapterPlan, where: str) -> dict[str, object]:
    """The field that says that copies serve what is tied too."""
    if not any(each.tied for each in plan.trained):
        return {}
    name = plan.spec.rule.peft_type
    if name not in fields.TYING:
        message = f"PEFT's format for {name} has no word for copies that stay tied"
        fail(CheckpointError, "E326", message, help="train them in an adapter of their own", where=where)
    apart = [each.module for each in plan.rows if not each.tied] + [at.site.name for at in plan.sites if at.site.tied]
    apart += [each.module for each in plan.trained if each.parted]
    if apart:
        message = f"PEFT keeps all that is tied so, or nothing: {apart[0]} is adapted by itself, and copies are 'tied'"
        fail(CheckpointError, "E326", message, help="train them in two adapters", where=where)
    return {"ensure_weight_tying": True}


def _tokens(plan: AdapterPlan, module_names: Sequence[str], where: str) -> dict[str, object]:
    """The field with the tokens whose rows are trained: a list, or one for each of several modules."""
    rule = plan.spec.rule
    if not plan.rows:
        return {}
    field = tokens_field(rule)
    if not field:
        message = f"PEFT's format for {rule.peft_type} has no field for trained tokens"
        fail(CheckpointError, "E326", message, help="train them in an adapter of their own", where=where)
    ids = {each.module: list(each.ids) for each in plan.rows}
    first = next(iter(ids.values()))
    if rule.rows:
        if any(each != first for each in ids.values()) or plan.trained:
            message = f"PEFT's format for {rule.peft_type} holds the same tokens for all modules, and no other module"
            fail(CheckpointError, "E326", message, where=where)
        return {field: first}
    if len(ids) == 1 and not any(each.modules for each in plan.spec.tokens):
        return {field: first}
    return {field: {(minimal_endings([module], module_names, ()) or (module,))[0]: ids[module] for module in ids}}


def _front_config(
    plan: AdapterPlan,
    base_model_name_or_path: str | None,
    task_type: str | None,
    revision: str | None,
    inference_mode: bool,
    trained: Sequence[str],
    where: str,
) -> dict[str, object]:
    """The configuration of what stands in front: PEFT knows no targets there, and needs a task."""
    if plan.spec.bias != "none":
        message = f"PEFT's format for {plan.spec.rule.peft_type} has no field for trained biases"
        fail(CheckpointError, "E326", message, help="train them in an adapter of their own", where=where)
    config: dict[str, object] = {
        "peft_type": plan.spec.rule.peft_type,
        "peft_version": fields.PEFT_VERSION,
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "revision": revision,
        "inference_mode": inference_mode,
    }
    config.update(_ties(plan, where))
    site = plan.sites[0].site
    if site.kind in WHOLE:
        config["modules_to_save"] = list(trained) or None
    else:
        config["target_modules"] = _attention_target(plan, trained, where)
    config.update(placed_sizes(plan))
    config.update(_written_values(plan, where))
    return config


def placed_sizes(plan: AdapterPlan) -> dict[str, int]:
    """The fields that tell a size of the place, with the place's own."""
    site = plan.sites[0].site
    sizes = {
        "in": site.in_features,
        "out": site.out_features,
        "num_layers": site.layers,
        "num_heads": site.heads,
        "num_stacks": site.stacks,
    }
    return {name: sizes[word] for name, word in placed_fields(plan.spec.rule).items()}


def _attention_target(plan: AdapterPlan, trained: Sequence[str], where: str) -> str:
    """The end of the names of the attention modules, of which PEFT takes so many from the last."""
    kind, ends = plan.spec.rule.peft_type, {each.site.module.rpartition(".")[2] for each in plan.sites}
    if trained:
        message = f"PEFT's format for {kind} has no field for trained modules"
        fail(CheckpointError, "E326", message, help="train them in an adapter of their own", where=where)
    if len(ends) > 1 or any(dict(each.bound.values).get(LAST, 0) is None for each in plan.sites):
        names = ", ".join(each.site.module for each in plan.sites)
        message = f"PEFT's format for {kind} names the last attention modules, and no others"
        fail(CheckpointError, "E326", message, help=f"adapted here: {names}", where=where)
    return ends.pop()


def _module_targets(plan: AdapterPlan, module_names: Sequence[str]) -> list[str] | str:
    copied = [each.module for each in plan.copies if each.saved] + [each.module for each in plan.rows if each.saved]
    if copied:
        suffixes_of = minimal_suffixes(copied, module_names)
        return "|".join(map(re.escape, copied)) if suffixes_of is None else sorted(suffixes_of)
    modules = _modules(plan)
    if not modules:
        return [] if plan.sites else fields.NO_MODULES
    # A list of modules by flag has to be a part of this one, name by name.
    flags = listed_fields(plan.spec.rule).values()
    groups: dict[tuple[Value, ...], list[str]] = {}
    for name, each in modules.items():
        groups.setdefault(tuple(dict(each.bound.values)[flag] for flag in flags), []).append(name)
    found = [minimal_suffixes(group, module_names) for group in groups.values()]
    if None in found:
        return "|".join(map(re.escape, modules))
    return sorted({name for suffixes in found for name in suffixes or ()})


def _listed(plan: AdapterPlan, module_names: Sequence[str]) -> dict[str, object]:
    """The fields that name the modules at which a flag is true."""
    written: dict[str, object] = {}
    names = _peft_names(plan)
    sites = {names[each.site.name]: each for each in plan.sites}
    known = list(dict.fromkeys((*module_names, *sites)))
    for name, flag in listed_fields(plan.spec.rule).items():
        chosen = [site for site, each in sites.items() if dict(each.bound.values)[flag]]
        found = minimal_suffixes(chosen, known) if chosen else ()
        written[name] = "|".join(re.escape(each) for each in chosen) if found is None else list(found)
    return written


def _parameter_targets(plan: AdapterPlan, module_names: Sequence[str]) -> list[str]:
    names = _peft_names(plan)
    chosen = {each.site.name: each.site for each in plan.sites if _is_held(each.site, names)}
    # Which modules hold a parameter of that name is not known here, so every module counts as if it did.
    leaves = {site.leaf for site in chosen.values()}
    held = [f"{module}.{leaf}" for module in module_names for leaf in leaves]
    found: dict[str, None] = {}
    taken = {suffix for name in held if name not in chosen for suffix in suffixes(name)}
    for name in chosen:
        found[next((each for each in suffixes(name)[1:] if each not in taken), name)] = None
    return sorted(found)


def _modules(plan: AdapterPlan) -> dict[str, PlannedSite]:
    """What PEFT knows by its module."""
    names = _peft_names(plan)
    found: dict[str, PlannedSite] = {}
    for each in plan.sites:
        if not _is_held(each.site, names):
            found.setdefault(names[each.site.name], each)
    return found


def _peft_names(plan: AdapterPlan) -> dict[str, str]:
    """What PEFT calls the sites: a MultiheadAttention with packed weights is one module, adapted as a whole."""
    sites = {each.site.name: each.site for each in plan.sites}

    def name(site: Site) -> str:
        whole = {f"{site.attention}.{part}".lstrip(".") for part in ("in_proj_weight", "out_proj")}
        return site.name if site.attention is None or not whole <= set(sites) else site.attention

    return {each: name(site) for each, site in sites.items()}


def _is_held(site: Site, names: Mapping[str, str]) -> bool:
    """Whether PEFT knows it as a parameter, not by its module."""
    return site.kind in HELD and names[site.name] == site.name


def _written_values(plan: AdapterPlan, where: str) -> dict[str, object]:
    rule, names, written = plan.spec.rule, _peft_names(plan), dict[str, object]()
    mapped, patterns, decided = mapped_fields(rule), pattern_fields(rule), decided_fields(rule)
    written |= constant_fields(rule)
    for name, hyperparameter in mapped.items():
        values: dict[str, Value] = {}
        for each in plan.sites:
            value, module = _plain(dict(each.bound.values)[hyperparameter.name]), names[each.site.name]
            if values.setdefault(module, value) != value:
                message = f"'{hyperparameter.name}' differs within '{module}', which PEFT adapts as a whole"
                fail(CheckpointError, "E326", message, where=where)
        if not values:
            written[name] = _listed_value(_plain(dict(plan.spec.values)[hyperparameter.name]))
            continue
        usual, exceptions = value_pattern(values)
        written[name] = _listed_value(usual)
        if exceptions and name not in patterns:
            _refuse_varied(name, hyperparameter.name, values, usual, where)
        if exceptions:
            written[patterns[name]] = exceptions
    for hyperparameter_name, decided_by in decided.items():
        found = {each.site.name: dict(each.bound.values)[hyperparameter_name] for each in plan.sites}
        value = next(iter(found.values()), dict(plan.spec.values)[hyperparameter_name])
        for field in decided_by:
            if len(set(found.values())) > 1:
                _refuse_varied(field.name, hyperparameter_name, found, value, where)
            written[field.name] = translated(field, hyperparameter_name, value)
    return written


def _refuse_varied(field: str, hyperparameter: str, values: Mapping[str, Value], usual: Value, where: str) -> NoReturn:
    site = min(site for site, value in values.items() if value != usual)
    fail(
        CheckpointError,
        "E326",
        f"PEFT's format holds one '{field}' for all modules, but '{hyperparameter}' differs between sites",
        help=f"{usual!r} at most of them, {values[site]!r} at '{site}'",
        where=where,
    )


def _plain(value: Value) -> Value:
    """16.0 as 16: PEFT's ranks and alphas are written as whole numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed_value(value: Value) -> object:
    """A list as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def _with_heads(trained: Sequence[str], task_type: str | None) -> tuple[str, ...]:
    """Trained modules beside all the names by which PEFT knows a task's heads, as it writes them itself."""
    heads = fields.TASK_HEADS.get(task_type or "", ()) if trained else ()
    return (*trained, *(each for each in heads if each not in trained))


def _trains_more(task_type: str | None, module_names: Sequence[str], copied: Sequence[str]) -> bool:
    heads = fields.TASK_HEADS.get(task_type or "", ())
    return any(name.endswith(heads) for name in module_names if name not in copied) if heads else False
