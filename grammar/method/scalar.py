"""Scalars with values: what an expression over hyperparameters comes to."""

import math
import operator
from collections.abc import Callable, Mapping
from typing import NoReturn

from peftc.grammar.diagnostics import SpecError, fail
from peftc.grammar.method.rule import Value
from peftc.grammar.source import Span
from peftc.grammar.syntax import expression, tree

_LARGEST = 2**63
_LARGEST_SIZE = 2**40

_Number = int | float

_ARITHMETIC: Mapping[str, Callable[[_Number, _Number], _Number]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": lambda base, exponent: float(base) ** float(exponent),
}
_COMPARISON: Mapping[str, Callable[[_Number, _Number], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def _divisors(number: _Number) -> list[int]:
    """All divisors of a whole number, in order. Raises ValueError for one that no size is."""
    whole = abs(int(number))
    if whole > _LARGEST_SIZE:
        raise ValueError(f"{whole} is too large to look for its divisors")
    small = [each for each in range(1, math.isqrt(whole) + 1) if whole % each == 0]
    return sorted({*small, *(whole // each for each in small)})


def _nearest_divisor(number: _Number, wanted: _Number) -> int:
    """The divisor of a whole number nearest to the wanted one; of two as near, the smaller."""
    return min(_divisors(number), key=lambda each: abs(each - wanted), default=1)


def _largest_divisor(number: _Number, limit: _Number) -> int:
    """The largest divisor of a whole number that is not above the limit; 1 where all are."""
    return max((each for each in _divisors(number) if each <= limit), default=1)


LEN = "len"

# name -> fewest and most arguments, and the function
SCALAR_FUNCTIONS: Mapping[str, tuple[int, int, Callable[..., _Number]]] = {
    "floor": (1, 1, math.floor),
    LEN: (1, 1, len),  # of a list
    "largest_divisor": (2, 2, _largest_divisor),
    "max": (2, 8, max),
    "min": (2, 8, min),
    "nearest_divisor": (2, 2, _nearest_divisor),
    "round": (1, 1, round),
    "sqrt": (1, 1, math.sqrt),
}

OF_LISTS = frozenset({LEN, "max", "min"})  # what also takes a list alone

# What these give is a whole number, of any number; what others give is one if all their arguments are.
ROUNDING = frozenset({"floor", "round"})


def evaluate(expr: tree.Expr, values: Mapping[str, Value], span: Span | None = None) -> Value:
    """The value of a type-checked scalar expression. Raises SpecError (E213) where there is none: 1 / 0, sqrt(-1).

    `span` is where to say so, when the expression itself is in a method the user did not write.
    """

    def rec(each: tree.Expr) -> Value:
        return evaluate(each, values, span)

    match expr:
        case tree.Number(value) | tree.Text(value) | tree.Flag(value):
            return value
        case tree.Name(name):
            return values[name]
        case tree.Null():
            return None
        case tree.Unary("not", operand):
            return not rec(operand)
        case tree.Unary(_, operand):
            return -_number(rec(operand))
        case tree.Conditional(then, test, otherwise):
            return rec(then) if rec(test) else rec(otherwise)
        case tree.Binary("and", left, right):
            return bool(rec(left)) and bool(rec(right))
        case tree.Binary("or", left, right):
            return bool(rec(left)) or bool(rec(right))
        case tree.Binary("==", left, right):
            return rec(left) == rec(right)
        case tree.Binary("!=", left, right):
            return rec(left) != rec(right)
        case tree.Binary(sign, left, right) if sign in _COMPARISON:
            return _COMPARISON[sign](_number(rec(left)), _number(rec(right)))
        case tree.Binary(sign, left, right):
            return _guarded(expr, span, _ARITHMETIC[sign], _number(rec(left)), _number(rec(right)))
        case tree.Sequence(items):
            return tuple(_whole(rec(each)) for each in items)
        case tree.Call(function, arguments):
            given = [rec(each.value) for each in arguments]
            numbers = [each if isinstance(each, tuple) else _number(each) for each in given]
            return _guarded(expr, span, SCALAR_FUNCTIONS[function][2], *numbers)
        case _:
            raise AssertionError(f"not a scalar: {expr}")


def _guarded(
    expr: tree.Expr, span: Span | None, function: Callable[..., _Number], *operands: _Number | tuple[int, ...]
) -> _Number:
    try:
        result = function(*operands)
    except ZeroDivisionError:
        _fail(expr, span, "divides by zero")
    except (OverflowError, ValueError):
        _fail(expr, span, "has no finite value")
    if isinstance(result, complex) or not math.isfinite(result) or (isinstance(result, int) and abs(result) > _LARGEST):
        _fail(expr, span, "has no finite value")
    return result


def _fail(expr: tree.Expr, span: Span | None, what: str) -> NoReturn:
    fail(SpecError, "E213", f"'{expression.text(expr)}' {what}", span or expr.span)


def _whole(value: Value) -> int:
    assert isinstance(value, int), value
    return value


def _number(value: Value) -> _Number:
    assert isinstance(value, int | float), value
    return value
