"""A method's `peft` item: which field of adapter_config.json is which hyperparameter, and what values it can have."""

import sys
from collections.abc import Mapping

from peftc.grammar import tree
from peftc.grammar.rule import MethodRule, Value


def constant(value: tree.Expr) -> Value:
    """The value of a literal; None for `none` and for anything that is not one."""
    match value:
        case tree.Number() | tree.Text() | tree.Flag():
            return value.value
        case tree.Unary("-", tree.Number() as number):
            return -number.value
        case _:
            return None


def mapped_fields(rule: MethodRule) -> dict[str, tree.Hyperparameter]:
    """The fields that are a hyperparameter under another name."""
    named = {each.name: each for each in rule.hyperparameters}
    return {name: named[value.id] for name, value in rule.peft_fields if isinstance(value, tree.Name)}


def mismatches(config: Mapping[str, object], rule: MethodRule) -> list[tuple[str, Value]]:
    """The fields a method holds constant to which a configuration gives another value, with the constant."""
    mapped = mapped_fields(rule)
    constants = [(name, constant(value)) for name, value in rule.peft_fields if name not in mapped]
    return [(name, value) for name, value in constants if config.get(name, value) != value]


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
        case "text", str() if not hyperparameter.choices or raw in hyperparameter.choices:
            return raw
        case _:
            return None


def expected(hyperparameter: tree.Hyperparameter) -> str:
    """What a hyperparameter's value should be, for messages."""
    if hyperparameter.choices:
        return f"one of {', '.join(hyperparameter.choices)}"
    return {"int": "a whole number", "float": "a number", "bool": "true or false", "text": "a text"}[
        hyperparameter.type
    ]
