"""A method's `peft` item: which field of adapter_config.json is which hyperparameter, and what values it can have."""

import sys
from collections.abc import Mapping
from dataclasses import replace

from peftc.grammar.diagnostics import UsageError, did_you_mean, fail
from peftc.grammar.method.infer import NAMED
from peftc.grammar.method.peft_item import (
    ANY,
    TOKENS,
    constant,
    domain,
    listed_flag,
    lists_tokens,
    masked_vector,
    names_in,
    translated,
)
from peftc.grammar.method.rule import MethodRule, Value
from peftc.grammar.spec.spec import AdapterSpec
from peftc.grammar.syntax import tree


def with_values(spec: AdapterSpec, values: Mapping[str, Value]) -> AdapterSpec:
    """The adapter with other values for some hyperparameters. Raises UsageError (E568)."""
    known = {each.name: each for each in spec.rule.hyperparameters}
    given = dict(spec.values)
    for name, raw in values.items():
        if name not in known:
            help = did_you_mean(name, known) or f"it has {', '.join(known)}"
            fail(UsageError, "E568", f"method '{spec.rule.name}' has no hyperparameter {name!r}", help=help)
        value = typed(raw, known[name])
        if value is None:
            fail(UsageError, "E568", f"{name} = {raw!r} is not {expected(known[name])}")
        given[name] = value
    return replace(spec, values=tuple(given.items()))


def mapped_fields(rule: MethodRule) -> dict[str, tree.Hyperparameter]:
    """The fields that are a hyperparameter under another name."""
    named = {each.name: each for each in rule.hyperparameters}
    return {
        each.name: named[each.value.id]
        for each in rule.peft_fields
        if isinstance(each.value, tree.Name) and each.value.id in named
    }


def constant_fields(rule: MethodRule) -> dict[str, Value]:
    """The fields a method holds constant."""
    literals = [each for each in rule.peft_fields if not names_in(each.value)]
    return {each.name: constant(each.value) for each in literals}


def decided_fields(rule: MethodRule) -> dict[str, list[tree.PeftField]]:
    """The fields that the value of one hyperparameter decides, by hyperparameter."""
    found: dict[str, list[tree.PeftField]] = {}
    for each in rule.peft_fields:
        names = names_in(each.value)
        if names and not (isinstance(each.value, tree.Name) or listed_flag(each) or masked_vector(each)):
            found.setdefault(next(iter(names)), []).append(each)
    return found


def listed_fields(rule: MethodRule) -> dict[str, str]:
    """The fields that list modules, with the flag that is true there."""
    return {each.name: flag for each in rule.peft_fields if (flag := listed_flag(each))}


def mask_field(rule: MethodRule) -> str:
    """The field that lists which entries of a budgeted vector are kept; empty where there is none."""
    return next((each.name for each in rule.peft_fields if masked_vector(each)), "")


def placed_fields(rule: MethodRule) -> dict[str, str]:
    """The fields that tell a size of the place an adapter is for, with the word for it."""
    named = {each.name for each in rule.hyperparameters} | {ANY, TOKENS}
    names = {each.name: each.value.id for each in rule.peft_fields if isinstance(each.value, tree.Name)}
    return {name: word for name, word in names.items() if word not in named}


def tokens_field(rule: MethodRule) -> str:
    """The field that holds the ids of the tokens whose rows are trained; empty where there is none."""
    named = {each.name for each in rule.hyperparameters}
    return next((each.name for each in rule.peft_fields if lists_tokens(each) and TOKENS not in named), "")


def pattern_fields(rule: MethodRule) -> dict[str, str]:
    """The fields that have exceptions by module, with the field that holds them."""
    return {each.name: each.pattern for each in rule.peft_fields if each.pattern}


def undecided(config: Mapping[str, object], rule: MethodRule) -> list[str]:
    """The fields whose values no value of their hyperparameter explains."""
    return [
        field.name
        for name, fields in decided_fields(rule).items()
        if deciding_value(config, rule, name) is None
        for field in fields
        if field.name in config
    ]


def deciding_value(config: Mapping[str, object], rule: MethodRule, name: str) -> tuple[Value] | None:
    """The value of a hyperparameter that explains the fields it decides, in a tuple; None where there is none."""
    hyperparameter = next(each for each in rule.hyperparameters if each.name == name)
    given = [each for each in decided_fields(rule)[name] if each.name in config]
    default = constant(hyperparameter.default)
    # The default first: fields that say nothing leave it as it is.
    for value in (default, *domain(hyperparameter)):
        if all(same(translated(each, name, value), config[each.name]) for each in given):
            return (value,)
    return None


def any_fields(rule: MethodRule) -> set[str]:
    """The fields that change nothing of a loaded adapter, whatever they say."""
    return {each.name for each in rule.peft_fields if isinstance(each.value, tree.Name) and each.value.id == ANY}


def init_values(rule: MethodRule, field: str) -> tuple[Value, ...]:
    """What a field can say of a method's start; empty where it says nothing."""
    for each in rule.peft_fields:
        if each.name == field and names_in(each.value) and each.value != tree.Name(ANY):
            hyperparameter = next(known for known in rule.hyperparameters if known.name in names_in(each.value))
            return tuple(translated(each, hyperparameter.name, value) for value in domain(hyperparameter))
    return ()


def mismatches(config: Mapping[str, object], rule: MethodRule) -> list[tuple[str, Value]]:
    """The fields a method holds constant to which a configuration gives another value, with the constant."""
    constants = constant_fields(rule).items()
    return [(name, value) for name, value in constants if not same(value, config.get(name, value))]


def same(ours: Value, theirs: object) -> bool:
    """Whether two values are equal and both or neither of them a flag."""
    return ours == theirs and isinstance(ours, bool) == isinstance(theirs, bool)


def typed(raw: object, hyperparameter: tree.Hyperparameter) -> Value:
    """The value if it is one the hyperparameter can have, else None."""
    match hyperparameter.type, raw:
        case "bool", bool():
            return raw
        case (("int" | "float"), bool()):
            return None
        case "int", int():
            return raw
        case "float", int() | float() if abs(raw) <= sys.float_info.max:
            return float(raw)
        case "ints", list() if all(isinstance(each, int) and not isinstance(each, bool) for each in raw):
            return tuple(raw)
        case "text", str() if not hyperparameter.choices or raw in hyperparameter.choices:
            return raw
        case _:
            return None


def expected(hyperparameter: tree.Hyperparameter) -> str:
    """What a hyperparameter's value should be, for messages."""
    if hyperparameter.choices:
        return f"one of {', '.join(hyperparameter.choices)}"
    return NAMED[hyperparameter.type]
