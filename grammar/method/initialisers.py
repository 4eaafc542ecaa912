"""How a tensor may start: the known initialisers and their arguments."""

from collections.abc import Mapping
from typing import NoReturn

from peftc.grammar.diagnostics import SpecError, did_you_mean, fail
from peftc.grammar.syntax import expression, tree

# Arguments of the initialisers with their defaults; None means it must be given.
INITIALISERS: Mapping[str, tuple[tuple[str, float | str | None], ...]] = {
    "zeros": (),
    "ones": (),
    "constant": (("value", None),),
    "normal": (("mean", 0.0), ("std", 1.0)),
    "uniform": (("low", None), ("high", None), ("digits", 24.0)),  # of the draws: 8 for bfloat16, 11 for float16
    "kaiming_uniform": (("a", 0.0), ("copies", 1.0)),  # each column drawn once and put that often, side by side
    "xavier_uniform": (),
    "randperm": (("limit", None),),
    "balanced": (("limit", None),),
    "distinct": (("limit", None),),
    "places": (("rows", None), ("columns", None)),
    "off_diagonal": (("size", None),),
    "randint": (("limit", None),),
    "encoded": (("text", None), ("tokenizer", "")),
    "listed": (("values", None),),
    "covariance": (),
    "second_moment": (),
    "quantization_error": (),
}
TYPED = {"encoded": "text", "listed": "ints"}  # what takes no numbers: the type of its arguments
MEASURED = ("covariance", "second_moment")  # of the inputs a site sees
ROUNDED = "quantization_error"  # of a site's weight: what it was less what is stored of it


def initialiser(expr: tree.Expr) -> str:
    """The initialiser an expression names or calls; empty where it is another expression."""
    name = expr.id if isinstance(expr, tree.Name) else expr.function if isinstance(expr, tree.Call) else ""
    return name if name in INITIALISERS else ""


def branches(expr: tree.Expr) -> tuple[tree.Expr, ...]:
    """The starts that conditions choose from."""
    if isinstance(expr, tree.Conditional):
        return (*branches(expr.then), *branches(expr.otherwise))
    return (expr,)


def match_arguments(expr: tree.Expr) -> dict[str, tree.Expr]:
    """The arguments of an initialiser by name, given by position or by name. Raises SpecError (E136)."""
    given: dict[str, tree.Expr] = {}
    if isinstance(expr, tree.Call):
        names = [each for each, _ in INITIALISERS[expr.function]]
        for position, argument in enumerate(expr.arguments):
            _match(expr, names, position, argument, given)
    for argument_name, default in INITIALISERS[initialiser(expr)]:
        if argument_name not in given and default is None:
            message = f"'{initialiser(expr)}' needs a value for '{argument_name}'"
            fail(SpecError, "E136", message, expr.span)
    return given


def _match(
    expr: tree.Call, names: list[str], position: int, argument: tree.Argument, given: dict[str, tree.Expr]
) -> None:
    if argument.name is None and position >= len(names):
        count = f"at most {len(names)} argument{'s' if len(names) > 1 else ''}" if names else "no arguments"
        fail(SpecError, "E136", f"'{expr.function}' takes {count}", argument.span)
    name = argument.name if argument.name is not None else names[position]
    if name not in names:
        help = did_you_mean(name, names) or (f"it takes {', '.join(names)}" if names else "it takes none")
        fail(SpecError, "E136", f"'{expr.function}' has no argument '{name}'", argument.span, help=help)
    if name in given:
        fail(SpecError, "E136", f"'{name}' is given twice", argument.span)
    given[name] = argument.value


def unknown_initialiser(expr: tree.Expr, fills: bool = False) -> NoReturn:
    """Raise E136 for what is meant to be an initialiser and is none; `fills` says that it is a number."""
    name = expr.id if isinstance(expr, tree.Name) else expr.function if isinstance(expr, tree.Call) else ""
    written = expression.text(expr)
    help = f"known initialisers: {', '.join(INITIALISERS)}; or an expression over W"
    if fills:
        help = f"to start every entry with it, write constant({written})"
    message = f"'{written}' is not an initialiser"
    fail(SpecError, "E136", message, expr.span, help=did_you_mean(name, INITIALISERS) or help)
