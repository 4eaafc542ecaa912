"""adapter_config.json, both ways: PEFT's configuration as an AdapterSpec, and a plan as PEFT's configuration."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from peftc.grammar.diagnostics import CheckpointError, did_you_mean, fail
from peftc.grammar.method.rule import MethodRule, Value, Values
from peftc.grammar.spec.spec import AdapterSpec, Target, Tokens
from peftc.grammar.spec.values import complete
from peftc.grammar.syntax import tree
from peftc.passes.foreign import peft as fields
from peftc.runtime.peft_config.fresh_config import check_fresh, with_known_start, without_nulls
from peftc.runtime.peft_config.json_fields import FieldReader, shown
from peftc.runtime.peft_config.peft_config_write import write_config
from peftc.runtime.peft_config.peft_rule import (
    decided_fields,
    deciding_value,
    expected,
    listed_fields,
    mapped_fields,
    mask_field,
    mismatches,
    pattern_fields,
    placed_fields,
    tokens_field,
    typed,
    undecided,
)
from peftc.runtime.peft_config.peft_targets import other_layers, places, skips, targets
from peftc.runtime.peft_config.spec_config import read_spec_fields
from peftc.runtime.peft_format.peft_names import (
    ending_selector,
    pattern_key_selector,
    suffix_selector,
)

__all__ = ["ConfigFacts", "read_config", "write_config"]

_VERSION = re.compile(r"(\d+)\.(\d+)")

Bias = Literal["none", "all", "adapter"]


@dataclass(frozen=True)
class ConfigFacts:
    """What an adapter_config.json says: the adapter, and what is not part of a spec."""

    spec: AdapterSpec
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    inference_mode: bool = False
    auto_mapping: Mapping[str, object] | None = None
    masks: Mapping[str, Sequence[bool]] = field(default_factory=dict)  # by parameter: which entries the file has
    sizes: Mapping[str, object] = field(default_factory=dict)  # of the place it is for, as far as they are told
    ties: bool = False  # whether what is tied in the base is to be adapted as one
    warnings: tuple[str, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)  # the fields, of a fresh adapter


def read_config(
    config: Mapping[str, object],
    *,
    methods: Mapping[str, MethodRule],
    adapter_name: str,
    where: str,
    strict: bool = True,
    fresh: bool = False,
) -> ConfigFacts:
    """The spec of a PEFT configuration. `where` names the file in messages.

    A field that nobody knows is refused if `strict`, and a warning otherwise. Of a `fresh` adapter, which no file
    fills, every field counts that says how it starts and is trained; and it trains the heads of its task, which a file
    names among its trained modules.

    Raises:
        CheckpointError: all that is wrong at once; an unknown method, a field of the wrong type, or a feature whose
            mathematics is not supported.
    """
    told: tuple[str, ...] = ()
    if fresh:
        config, told = with_known_start(config)
    reader = FieldReader(config, where, strict=strict)
    if config.get("peft_type") == fields.OWN_TYPE:
        return _facts(reader, read_spec_fields(reader, adapter_name))
    rule = _rule(config, methods, where)
    if fresh:
        reader = FieldReader(without_nulls(config, rule), where)
        reader.warnings.extend(told)
    _refuse_unsupported(reader, rule, fresh=fresh)
    if fresh:
        check_fresh(reader, rule)
    else:
        _check_version(reader)
    values = _values(reader, rule)
    heads = _heads(reader, rule) if fresh else ()
    train = tuple(ending_selector(each) for each in dict.fromkeys((*reader.texts("modules_to_save"), *heads)))
    spec = AdapterSpec(
        name=adapter_name,
        rule=rule,
        values=values,
        on=() if rule.rows else places(reader, rule) if rule.prompt is not None else targets(reader, fresh=fresh),
        refine=(*_listed(reader, rule), *_refinements(reader, rule)),
        skip=(*skips(reader), *(other_layers(reader) if fresh else ())),
        train=train,
        tied=train if config.get("ensure_weight_tying") is True else (),
        bias=_bias(reader, rule),
        tokens=_tokens(reader, rule),
        strict=False,
    )
    facts = _facts(reader, spec)
    return replace(facts, config=reader.config) if fresh else facts


def _heads(reader: FieldReader, rule: MethodRule) -> tuple[str, ...]:
    """The heads that PEFT trains unasked for a task, beside methods that have a field for trained modules."""
    trains_none = rule.rows or "attention" in rule.kinds
    return () if trains_none else fields.TASK_HEADS.get(reader.text("task_type") or "", ())


def _facts(reader: FieldReader, spec: AdapterSpec) -> ConfigFacts:
    facts = ConfigFacts(
        spec=spec,
        base_model_name_or_path=reader.text("base_model_name_or_path") or None,
        revision=reader.text("revision"),
        task_type=reader.text("task_type"),
        inference_mode=bool(reader.get("inference_mode", bool, "true or false")),
        auto_mapping=reader.table("auto_mapping"),
        masks=_masks(reader, spec.rule),
        sizes={name: size for name in placed_fields(spec.rule) if (size := reader.config.get(name)) is not None},
        ties=bool(reader.get("ensure_weight_tying", bool, "true or false")),
        warnings=tuple(reader.warnings),
    )
    if reader.problems:
        raise CheckpointError(*reader.problems)
    return facts


def _rule(config: Mapping[str, object], methods: Mapping[str, MethodRule], where: str) -> MethodRule:
    known = {rule.peft_type for rule in methods.values() if rule.peft_type}
    wanted = config.get("peft_type")
    supported = f"supported: {', '.join(sorted(known)) or 'none'}"
    if wanted is None:
        fail(CheckpointError, "E320", "no field 'peft_type': not a PEFT adapter_config.json", where=where)
    if not isinstance(wanted, str) or wanted not in known:
        guess = did_you_mean(wanted, known) if isinstance(wanted, str) else ""
        lines = f"{guess}\n{supported}" if guess else supported
        fail(CheckpointError, "E328", f"PEFT type {shown(wanted)} is not supported yet", help=lines, where=where)
    of_type = [rule for rule in methods.values() if rule.peft_type == wanted]

    # Where none fits, the nearest one says what is wrong; where several do, they differ in how they start, which is
    # past: the one that needs the least for it.
    def distance(rule: MethodRule) -> tuple[int, int]:
        wrong = len(mismatches(config, rule)) + len(undecided(config, rule))
        return wrong, sum(each.once for each in rule.params)

    return min(of_type, key=distance)


def _refuse_unsupported(reader: FieldReader, rule: MethodRule, *, fresh: bool) -> None:
    own = {name for each in rule.peft_fields for name in (each.name, each.pattern) if name}
    known = own | fields.HANDLED | fields.HARMLESS | fields.UNSUPPORTED
    for name in undecided(reader.config, rule):
        value = reader.config[name]
        if fields.INIT_FIELD.fullmatch(name):
            if not fresh:
                _check_init(reader, name, value)
        else:
            reader.problem("E321", f"field '{name}' = {shown(value)} is not known to method '{rule.name}'")
    for name, wanted in mismatches(reader.config, rule):
        if fields.INIT_FIELD.fullmatch(name) and (fresh or isinstance(reader.config[name], str)):
            if not fresh:
                _check_init(reader, name, reader.config[name])
            continue
        given = f"field '{name}' = {shown(reader.config[name])}"
        reader.problem("E322", f"{given} is not supported by method '{rule.name}': only {shown(wanted)}")
    unknown = []
    for name, value in reader.config.items():
        empty = value is None or value is False or value == {} or value == []
        if name in own or name in fields.HANDLED or name in fields.HARMLESS or empty:
            continue
        if fields.INIT_FIELD.fullmatch(name):
            if not fresh:
                _check_init(reader, name, value)
        elif name in fields.UNSUPPORTED:
            reader.problem("E322", f"field '{name}' = {shown(value)} is not supported yet")
        else:
            unknown.append(name)
    reader.unknown(unknown, known)


def _check_version(reader: FieldReader) -> None:
    written = _VERSION.match(reader.text("peft_version") or "")
    known = _VERSION.match(fields.PEFT_VERSION)
    if written and known and tuple(map(int, written.groups())) > tuple(map(int, known.groups())):
        reader.warnings.append(
            f"the adapter was saved by PEFT {written.string}; the format is known up to {fields.PEFT_VERSION}"
        )


def _check_init(reader: FieldReader, name: str, value: object) -> None:
    if value is not None and not isinstance(value, bool | str):
        reader.mistyped(name, "true, false or a text")
    elif isinstance(value, str):
        reader.problem(
            "E324",
            f"field '{name}' = {shown(value)}: this initialisation may have changed the base weights, and the adapter "
            "then fits only the changed ones",
            "convert the checkpoint to plain LoRA where it was trained:\n"
            "peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


def _values(reader: FieldReader, rule: MethodRule) -> Values:
    given = dict(complete(rule, ()))
    for name, hyperparameter in mapped_fields(rule).items():
        raw = reader.config.get(name)
        if raw is None:
            continue
        value = typed(raw, hyperparameter)
        if value is None:
            reader.mistyped(name, expected(hyperparameter))
        else:
            given[hyperparameter.name] = value
    for name in decided_fields(rule):
        decided = deciding_value(reader.config, rule, name)
        if decided is not None:
            given[name] = decided[0]
    return tuple(given.items())


def _bias(reader: FieldReader, rule: MethodRule) -> Bias:
    spelled: dict[str | None, Bias] = {
        None: "none",
        "none": "none",
        "all": "all",
        fields.only_adapter_bias(rule.peft_type): "adapter",
    }
    raw = reader.text("bias")
    if raw in spelled:
        return spelled[raw]
    reader.mistyped("bias", f"one of {', '.join(str(each) for each in spelled if each)}")
    return "none"


def _tokens(reader: FieldReader, rule: MethodRule) -> tuple[Tokens, ...]:
    """The tokens whose rows are trained: a list, or one for each of several modules."""
    name = tokens_field(rule)
    raw = reader.config.get(name) if name else None
    if raw is None:
        return ()
    listed: dict[tuple[tree.Selector, ...], object] = {_embeddings(reader) if rule.rows else (): raw}
    if isinstance(raw, dict) and not rule.rows:
        listed = {(ending_selector(module),): ids for module, ids in raw.items()}
    found = []
    for modules, ids in listed.items():
        if not isinstance(ids, list) or not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
            reader.mistyped(name, "a list of whole numbers" + (", or one for each module" if not rule.rows else ""))
            return ()
        if ids:
            found.append(Tokens(tuple(ids), modules))
    return tuple(found)


def _embeddings(reader: FieldReader) -> tuple[tree.Selector, ...]:
    """The modules whose rows a method trains that trains nothing else; none for the input embedding."""
    named = reader.text_or_texts("target_modules") or ()
    if isinstance(named, str):
        return (tree.PatternSelector(named),) if reader.pattern("target_modules", named) else ()
    return tuple(suffix_selector(each) for each in named)


def _masks(reader: FieldReader, rule: MethodRule) -> dict[str, Sequence[bool]]:
    name, masks = mask_field(rule), dict[str, Sequence[bool]]()
    for key, kept in ((reader.table(name) or {}) if name else {}).items():
        if isinstance(kept, list) and all(isinstance(each, bool) for each in kept):
            masks[key] = kept
        else:
            reader.problem("E321", f"field '{name}': '{key}' = {shown(kept)} is not a list of true and false")
    return masks


def _listed(reader: FieldReader, rule: MethodRule) -> tuple[Target, ...]:
    """Fields that name the modules at which a flag is true."""
    targets = []
    for name, flag in listed_fields(rule).items():
        modules = reader.text_or_texts(name) or ()
        selectors: tuple[tree.Selector, ...] = ()
        if not isinstance(modules, str):
            selectors = tuple(suffix_selector(each) for each in sorted(set(modules)))
        elif reader.pattern(name, modules):
            selectors = (tree.PatternSelector(modules),)
        if selectors:
            targets.append(Target(selectors, overrides=((flag, True),)))
    return tuple(targets)


def _refinements(reader: FieldReader, rule: MethodRule) -> tuple[Target, ...]:
    """rank_pattern and alpha_pattern. There the first match wins, here the last: the order is turned round."""
    mapped = mapped_fields(rule)
    varied = {pattern: mapped[name] for name, pattern in pattern_fields(rule).items()}
    exceptions: dict[str, Mapping[str, object]] = {}
    for name in dict.fromkeys(("rank_pattern", "alpha_pattern", *varied)):
        table = reader.table(name) or {}
        if name == mask_field(rule):
            continue
        if table and name not in varied:
            reader.problem("E322", f"field '{name}' is not supported for PEFT type {rule.peft_type}")
        elif table:
            exceptions[name] = table
    tables = [list(each) for each in exceptions.values()]
    if len(tables) == 2 and tables[0] == tables[1]:
        keys = [(key, tuple(exceptions)) for key in tables[0]]
    else:
        keys = [(key, (name,)) for name, table in exceptions.items() for key in table]
    targets = []
    for key, names in reversed(keys):
        overrides: list[tuple[str, Value]] = []
        for name in names:
            value = typed(exceptions[name][key], varied[name])
            if value is None:
                given = shown(exceptions[name][key])
                reader.problem("E321", f"field '{name}': '{key}' = {given} is not {expected(varied[name])}")
            overrides.append((varied[name].name, value))
        if reader.pattern(names[0], key):
            targets.append(Target((pattern_key_selector(key),), overrides=tuple(overrides)))
    return tuple(targets)
