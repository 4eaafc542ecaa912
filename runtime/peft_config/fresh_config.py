"""What a PEFT configuration says that no file makes up for: how a fresh adapter starts, and how it is trained.

Every field is followed, or idle (`passes/foreign/peft.py` says why), or refused by its name.
"""

from collections.abc import Mapping

from peftc.grammar.diagnostics import CheckpointError, fail
from peftc.grammar.method.rule import MethodRule
from peftc.passes.foreign import peft as fields
from peftc.passes.plan.plan import AdapterPlan
from peftc.runtime.peft_config.json_fields import FieldReader, shown
from peftc.runtime.peft_config.peft_config_write import placed_sizes
from peftc.runtime.peft_config.peft_rule import any_fields, constant_fields, init_values, mismatches, undecided


def with_known_start(config: Mapping[str, object]) -> tuple[Mapping[str, object], tuple[str, ...]]:
    """The configuration with the start that is made here in place of one that comes near it, and what is told of it."""
    value = config.get(fields.START_FIELD)
    if not isinstance(value, str) or not fields.NEARLY_DECOMPOSED.fullmatch(value):
        return config, ()
    told = (
        f"field '{fields.START_FIELD}' = {shown(value)}: the decomposition is made in full, not by random projections"
    )
    return {**config, fields.START_FIELD: fields.DECOMPOSED}, (told,)


def without_nulls(config: Mapping[str, object], rule: MethodRule) -> Mapping[str, object]:
    """The configuration without the fields that say nothing: PEFT fills them in later."""
    meant = {name for name, value in constant_fields(rule).items() if value is None}
    return {name: value for name, value in config.items() if value is not None or name in meant}


def check_fresh(reader: FieldReader, rule: MethodRule) -> None:
    """Collect every field that asks of a fresh adapter what is not done here."""
    config = reader.config
    _check_start(reader, rule)
    if rule.prompt is not None:
        for name in fields.OF_MODULES & config.keys():
            if config[name] not in ("none", {}, []) and not (name == "target_modules" and "attention" in rule.kinds):
                _refuse(reader, name, "leave it out: it is of the whole model")
    for name in fields.FRESH_ONLY.keys() & config.keys():
        allowed, help = fields.FRESH_ONLY[name]
        if config[name] not in allowed:
            _refuse(reader, name, help)
    idle = any_fields(rule) - fields.IDLE.keys() - fields.FRESH_ONLY.keys()
    for name in sorted(idle & config.keys()):
        if config[name] not in (None, False, {}, []):
            _refuse(reader, name, "leave it out")
    if config.get(fields.START_FIELD) == fields.MEASURED:
        _check_measured(reader)
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        message = "field 'layers_pattern' says where layers are, and 'layers_to_transform' is not given"
        reader.problem("E325", message, "say which layers, or leave it out")
    task = config.get("task_type")
    if isinstance(task, str) and task not in fields.TASK_TYPES:
        reader.mistyped("task_type", f"one of {', '.join(fields.TASK_TYPES)}")


def _check_start(reader: FieldReader, rule: MethodRule) -> None:
    """Refuse starts that are not those of the method, of which the nearest was chosen."""
    unmet = {*undecided(reader.config, rule), *(name for name, _ in mismatches(reader.config, rule))}
    known = {each.name for each in rule.peft_fields}
    for name, value in reader.config.items():
        if not fields.INIT_FIELD.fullmatch(name) or (name in known and name not in unmet):
            continue
        if name not in known and value in (True, None):
            continue
        starts = init_values(rule, name)
        here = f"known here: {', '.join(map(shown, starts))}" if starts else "leave it out"
        _refuse(reader, name, fields.OTHER_STARTS.get(str(value).lower(), "") or here)


def _check_measured(reader: FieldReader) -> None:
    """Every site keeps its rank, and nothing is whitened; what PEFT does where nothing is said is otherwise."""
    said = reader.config.get(fields.MEASURED_CONFIG)
    said = said if isinstance(said, Mapping) else {}
    if said.get("rho", 2.0) != 1 or said.get("whiten", False):
        help = "every module keeps its rank here, as with EvaConfig(rho=1.0), and nothing is whitened: say so"
        given = f"field '{fields.START_FIELD}' = {shown(fields.MEASURED)}"
        message = f"{given} with '{fields.MEASURED_CONFIG}' = {shown(dict(said))}"
        reader.problem("E322", f"{message} is not supported", help)


def _refuse(reader: FieldReader, name: str, help: str) -> None:
    message = f"field '{name}' = {shown(reader.config[name])} is not supported for a fresh adapter"
    reader.problem("E322", message, help)


def check_sizes(said: Mapping[str, object], plan: AdapterPlan) -> None:
    """Raise CheckpointError where a configuration tells sizes of a place that are not those of the model.

    The heads of a cache may be told as queries have them, and the width with them: PEFT takes those of keys from it.
    """
    found = placed_sizes(plan) if plan.sites else {}
    cached = bool(plan.sites) and plan.sites[0].site.kind == "cache"
    heads, width = (said.get(name, found.get(name)) for name in fields.HEADS_AND_WIDTH)
    size = found[fields.HEADS_AND_WIDTH[1]] // found[fields.HEADS_AND_WIDTH[0]] if cached else 0
    told_of_queries = cached and isinstance(heads, int) and width == size * heads
    for name in said.keys() & found.keys():
        idle = name == fields.HEADS_AND_WIDTH[0] and not cached
        if said[name] != found[name] and not idle and not (name in fields.HEADS_AND_WIDTH and told_of_queries):
            message = f"field '{name}' = {shown(said[name])}: the model has {found[name]}"
            fail(CheckpointError, "E322", message, help="leave it out", where=f"adapter {plan.name!r}")
