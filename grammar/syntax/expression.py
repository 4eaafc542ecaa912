"""Expressions as text, with the fewest parentheses that read back as the same tree."""

import re

from peftc.grammar.syntax import tree

_LEVEL = {"or": 1, "and": 2, "+": 5, "-": 5, "*": 6, "/": 6, "//": 6, "%": 6, "@": 6, "**": 8}
_COMPARISON, _UNARY, _POSTFIX, _ATOM = 4, 7, 9, 10

_CONTROL = re.compile(r'["\\\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]')
_SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def text(expr: tree.Expr) -> str:
    """The expression as it is written."""
    return _render(expr)[0]


def before_if(expr: tree.Expr) -> str:
    """The expression as it is written where an `if` may follow that is not its own."""
    return _at(expr, 1)


def quoted(value: str) -> str:
    """A string literal."""
    return '"' + _CONTROL.sub(lambda each: _SHORT.get(each.group(), f"\\u{ord(each.group()):04x}"), value) + '"'


def number(value: int | float) -> str:
    """A number literal; reads back as the same value of the same type."""
    return repr(value)


def arguments(items: tuple[tree.Argument, ...]) -> str:
    """`16, alpha = 32`."""
    return ", ".join(text(each.value) if each.name is None else f"{each.name} = {text(each.value)}" for each in items)


def literal(value: int | float | bool | str | tuple[int, ...] | None) -> tree.Expr:
    """The tree a value is written as."""
    match value:
        case None:
            return tree.Null()
        case bool():
            return tree.Flag(value)
        case str():
            return tree.Text(value)
        case tuple():
            return tree.Sequence(tuple(map(literal, value)))
        case _ if value < 0:
            return tree.Unary("-", tree.Number(-value))
        case _:
            return tree.Number(value)


def _render(expr: tree.Expr) -> tuple[str, int]:
    match expr:
        case tree.Number(value):
            return number(value), _ATOM if value >= 0 else _UNARY
        case tree.Text(value):
            return quoted(value), _ATOM
        case tree.Flag(value):
            return "true" if value else "false", _ATOM
        case tree.Null():
            return "none", _ATOM
        case tree.Name(name):
            return name, _ATOM
        case tree.Sequence(items):
            return f"[{', '.join(text(each) for each in items)}]", _ATOM
        case tree.Call(function, given):
            return f"{function}({arguments(given)})", _ATOM
        case tree.Transpose(operand):
            return f"{_at(operand, _POSTFIX)}.T", _POSTFIX
        case tree.Unary("not", operand):
            return f"not {_at(operand, 3)}", 3
        case tree.Unary(_, operand):
            return f"-{_at(operand, _UNARY)}", _UNARY
        case tree.Conditional(then, test, otherwise):
            return f"{_at(then, 1)} if {_at(test, 1)} else {_at(otherwise, 0)}", 0
        case tree.Binary("**", left, right):
            return f"{_at(left, _POSTFIX)} ** {_at(right, _UNARY)}", _LEVEL["**"]
        case tree.Binary(operator, left, right):
            level = _LEVEL.get(operator, _COMPARISON)
            first = level + 1 if level == _COMPARISON else level
            return f"{_at(left, first)} {operator} {_at(right, level + 1)}", level


def _at(expr: tree.Expr, level: int) -> str:
    written, own = _render(expr)
    return written if own >= level else f"({written})"
