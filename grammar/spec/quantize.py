"""`quantize = nf4(double_quant = true)`: how the base is to be stored, read from a spec and written into one."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, cast

from peftc.grammar.diagnostics import SpecError, did_you_mean, fail
from peftc.grammar.source import Span
from peftc.grammar.spec.spec import COMPUTE_TYPES, SCHEMES, Quantize
from peftc.grammar.syntax import expression, tree

_MODULE = re.compile(r"\w+(?:\.\w+)*")


def read_quantize(entry: tree.BaseEntry) -> Quantize:
    """What an entry `quantize = SCHEME(...)` means. Raises SpecError."""
    value = entry.value
    if isinstance(value, tree.Name):
        value = tree.Call(value.id, span=value.span)
    if not isinstance(value, tree.Call):
        fail(SpecError, "E153", "'quantize' is a scheme, and this is not", value.span, f"{_SCHEMES}, as in nf4()")
    if value.function not in SCHEMES:
        span = value.span and Span(value.span.source, value.span.start, value.span.start + len(value.function))
        help = did_you_mean(value.function, SCHEMES) or _SCHEMES
        fail(SpecError, "E150", f"there is no quantization scheme '{value.function}'", span, help)
    known = SCHEMES[value.function]
    given: dict[str, Any] = {}
    for each in value.arguments:
        if each.name is None or each.name not in known:
            _unknown(value.function, each)
        if each.name in given:
            fail(SpecError, "E143", f"'{each.name}' is given twice", each.span)
        given[each.name] = _READERS[each.name](each.value)
    return Quantize(cast(Any, value.function), **given, span=entry.span)


def to_expression(quantize: Quantize) -> tree.Expr:
    """What a person would have written: the options that are not as they are by default."""
    default = Quantize(quantize.scheme)
    names = (name for name in SCHEMES[quantize.scheme] if getattr(quantize, name) != getattr(default, name))
    given = tuple(tree.Argument(name, _written(getattr(quantize, name))) for name in names)
    return tree.Call(quantize.scheme, given)


def text(quantize: Quantize) -> str:
    """The same as text: `nf4(double_quant = true)`."""
    return expression.text(to_expression(quantize))


def _written(value: bool | float | str | tuple[str, ...]) -> tree.Expr:
    match value:
        case bool():
            return tree.Flag(value)
        case str():
            return tree.Name(value)
        case tuple():
            return tree.Sequence(tuple(map(tree.Text, value)))
        case _:
            return tree.Number(int(value) if value.is_integer() and value < 1e15 else value)


def _unknown(scheme: str, argument: tree.Argument) -> NoReturn:
    known = SCHEMES[scheme]
    if argument.name is None:
        help = f"as in {known[0]} = ..."
        fail(SpecError, "E141", f"the options of '{scheme}' are given by name", argument.span, help)
    help = did_you_mean(argument.name, known) or f"'{scheme}' takes {', '.join(known)}"
    fail(SpecError, "E141", f"'{scheme}' has no option '{argument.name}'", argument.span, help)


# --- options ---


def _double_quant(value: tree.Expr) -> bool:
    if not isinstance(value, tree.Flag):
        fail(SpecError, "E153", "'double_quant' is true or false, and this is not", value.span)
    return value.value


def _compute(value: tree.Expr) -> str | None:
    if isinstance(value, tree.Null):
        return None
    name = value.id if isinstance(value, tree.Name) else value.value if isinstance(value, tree.Text) else ""
    if not isinstance(value, tree.Name) or name not in COMPUTE_TYPES:
        close = f"write it without quotes: {name}" if name in COMPUTE_TYPES else did_you_mean(name, COMPUTE_TYPES)
        help = close or f"the types are {', '.join(COMPUTE_TYPES)}"
        fail(SpecError, "E153", "'compute' is the name of a type, and this is not one to compute in", value.span, help)
    return name


def _threshold(value: tree.Expr) -> float:
    number = value.operand if isinstance(value, tree.Unary) and value.operator == "-" else value
    if not isinstance(number, tree.Number):
        fail(SpecError, "E153", "'threshold' is a number, and this is not", value.span)
    if number is not value or not math.isfinite(number.value):
        help = "beyond it an activation is an outlier; 6 unless said, and of 0 there are no outliers"
        fail(SpecError, "E153", "'threshold' is a number from 0", value.span, help)
    return float(number.value)


def _skip(value: tree.Expr) -> tuple[str, ...] | None:
    if isinstance(value, tree.Null):
        return None
    if not isinstance(value, tree.Sequence):
        fail(SpecError, "E153", "'skip' is a list of modules, and this is not", value.span, 'as in skip = ["lm_head"]')
    names: list[str] = []
    for each in value.items:
        if not isinstance(each, tree.Text) or not _MODULE.fullmatch(each.value):
            help = 'a name, or the end of one, in double quotes: "lm_head"'
            fail(SpecError, "E153", "this is not the name of a module", each.span, help)
        if each.value in names:
            fail(SpecError, "E147", f"the module {expression.text(each)} is named twice", each.span)
        names.append(each.value)
    return tuple(names)


_SCHEMES = f"the schemes are {', '.join(SCHEMES)}"
_READERS: Mapping[str, Callable[[tree.Expr], object]] = {
    "double_quant": _double_quant,
    "compute": _compute,
    "threshold": _threshold,
    "skip": _skip,
}
