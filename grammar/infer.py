"""Types of expressions: scalars and matrices, and a table of what each operator and function takes and gives."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from peftc.grammar import expression, tree
from peftc.grammar.diagnostics import SpecError, did_you_mean, fail
from peftc.grammar.shapes import Dim, Shape


@dataclass(frozen=True)
class Scalar:
    """One number, flag or text, known once the hyperparameters have values.

    `choices` are the texts it can be, `dim` its size in normal form where it is a whole number made of sizes.
    """

    kind: str  # int, float, bool, text
    optional: bool = False
    choices: tuple[str, ...] = ()
    dim: Dim | None = None

    def __str__(self) -> str:
        name = {"int": "a whole number", "float": "a number", "bool": "true or false", "text": "a text"}[self.kind]
        return f"{name} or none" if self.optional else name


Type = Scalar | Shape

INT, FLOAT, BOOL, TEXT = Scalar("int"), Scalar("float"), Scalar("bool"), Scalar("text")

SCALAR_FUNCTIONS: Mapping[str, tuple[int, int]] = {"sqrt": (1, 1), "min": (2, 8), "max": (2, 8)}
MATRIX_FUNCTIONS = ("drop",)

_Rule = Callable[[tree.Binary, Type, Type], Type]


def type_of(expr: tree.Expr, names: Mapping[str, Type], used: set[str] | None = None) -> Type:
    """The expression's type. Raises SpecError where it has none; `used` collects the names it depends on."""
    used = set() if used is None else used

    def rec(each: tree.Expr) -> Type:
        return type_of(each, names, used)

    match expr:
        case tree.Number(int() as value):
            return Scalar("int", dim=Dim.constant(value))
        case tree.Number():
            return FLOAT
        case tree.Text():
            return TEXT
        case tree.Flag():
            return BOOL
        case tree.Null():
            _wrong(expr, "'none' has no place in an expression")
        case tree.Sequence():
            _wrong(expr, "a list has no place in an expression")
        case tree.Name(name):
            if name not in names:
                unknown_name(expr, names)
            used.add(name)
            return names[name]
        case tree.Call():
            return _call(expr, rec)
        case tree.Transpose(operand):
            found = rec(operand)
            if isinstance(found, Scalar):
                _wrong(expr, f"'.T' transposes a matrix, and '{expression.text(operand)}' is {found}")
            return found.transposed
        case tree.Unary("not", operand):
            need(operand, rec(operand), BOOL, "'not'")
            return BOOL
        case tree.Unary(_, operand):
            found = rec(operand)
            if isinstance(found, Shape):
                return found
            number(operand, found, "'-'")
            return Scalar(found.kind, dim=-found.dim if found.dim else None)
        case tree.Conditional(then, test, otherwise):
            need(test, rec(test), BOOL, "a condition")
            return _join(expr, rec(then), rec(otherwise))
        case tree.Binary(operator, left, right):
            first, second = rec(left), rec(right)
            key = (operator, isinstance(first, Shape), isinstance(second, Shape))
            if key not in _BINARY:
                _wrong(expr, f"'{operator}' does not take {_describe(first)} and {_describe(second)}", _advice(*key))
            return _BINARY[key](expr, first, second)


def unknown_name(expr: tree.Name, names: Iterable[str]) -> NoReturn:
    """Raise E130."""
    known = sorted(names)
    help = did_you_mean(expr.id, known) or f"known here: {', '.join(known)}"
    fail(SpecError, "E130", f"'{expr.id}' is not known here", expr.span, help=help)


def number(expr: tree.Expr, found: Type, what: str) -> None:
    """Raise E132 unless the type is a number."""
    if isinstance(found, Shape) or found.kind not in ("int", "float") or found.optional:
        _wrong(expr, f"{what} takes a number, and '{expression.text(expr)}' is {_describe(found)}")


def need(expr: tree.Expr, found: Type, wanted: Scalar, what: str) -> None:
    """Raise E132 unless the expression is such a scalar (a whole number is also a number)."""
    same = isinstance(found, Scalar) and (found.kind == wanted.kind or (found.kind, wanted.kind) == ("int", "float"))
    if not same or (isinstance(found, Scalar) and found.optional and not wanted.optional):
        _wrong(expr, f"{what} takes {wanted}, and '{expression.text(expr)}' is {_describe(found)}")


def _wrong(expr: tree.Expr, message: str, help: str = "") -> NoReturn:
    fail(SpecError, "E132", message, expr.span, help=help)


def _describe(found: Type) -> str:
    return f"a matrix {found}" if isinstance(found, Shape) else str(found)


def _advice(operator: str, left: bool, right: bool) -> str:
    if operator in "+-" and left != right:
        return "a number and a matrix do not add; multiply the number with a matrix first"
    if operator == "/" and right:
        return "a matrix divides by a number only"
    if operator == "@" and not (left and right):
        return "'@' multiplies two matrices; with a number write '*'"
    return ""


# --- operators: (operator, left is a matrix, right is a matrix) -> rule ---


def _arithmetic(expr: tree.Binary, left: Type, right: Type) -> Type:
    number(expr.left, left, f"'{expr.operator}'")
    number(expr.right, right, f"'{expr.operator}'")
    assert isinstance(left, Scalar)
    assert isinstance(right, Scalar)
    whole = left.kind == right.kind == "int" and expr.operator not in ("/", "**")
    if not whole:
        return FLOAT
    if left.dim is None or right.dim is None:
        return INT
    match expr.operator:
        case "+":
            return Scalar("int", dim=left.dim + right.dim)
        case "-":
            return Scalar("int", dim=left.dim + -right.dim)
        case "*":
            return Scalar("int", dim=left.dim * right.dim)
        case _:
            return Scalar("int", dim=Dim.atom(f"({left.dim}) // ({right.dim})"))


def _ordering(expr: tree.Binary, left: Type, right: Type) -> Type:
    number(expr.left, left, f"'{expr.operator}'")
    number(expr.right, right, f"'{expr.operator}'")
    return BOOL


def _equality(expr: tree.Binary, left: Type, right: Type) -> Type:
    assert isinstance(left, Scalar)
    assert isinstance(right, Scalar)
    families = {"int": "number", "float": "number"}
    if families.get(left.kind, left.kind) != families.get(right.kind, right.kind):
        _wrong(expr, f"{left} is never equal to {right}")
    for choices, other in ((left.choices, expr.right), (right.choices, expr.left)):
        if choices and isinstance(other, tree.Text) and other.value not in choices:
            help = did_you_mean(other.value, choices) or f"it is one of {', '.join(map(expression.quoted, choices))}"
            _wrong(other, f"{expression.quoted(other.value)} is not one of the choices", help)
    return BOOL


def _logic(expr: tree.Binary, left: Type, right: Type) -> Type:
    need(expr.left, left, BOOL, f"'{expr.operator}'")
    need(expr.right, right, BOOL, f"'{expr.operator}'")
    return BOOL


def _elementwise(expr: tree.Binary, left: Type, right: Type) -> Type:
    if left != right:
        fail(
            SpecError,
            "E133",
            f"'{expr.operator}' needs equal shapes: {expression.text(expr.left)} is {left}, "
            f"{expression.text(expr.right)} is {right}",
            expr.span,
        )
    return left


def _scale(expr: tree.Binary, left: Type, right: Type) -> Type:
    if isinstance(left, Shape):
        number(expr.right, right, f"'{expr.operator}' with a matrix")
        return left
    number(expr.left, left, f"'{expr.operator}' with a matrix")
    return right


def _matmul(expr: tree.Binary, left: Type, right: Type) -> Type:
    assert isinstance(left, Shape)
    assert isinstance(right, Shape)
    if left.columns != right.rows:
        names = f"{expression.text(expr.left)} is {left}, {expression.text(expr.right)} is {right}"
        help = ""
        if right.columns == left.rows:
            help = f"did you mean {expression.text(tree.Binary('@', expr.right, expr.left))}?"
        message = f"'@' needs as many columns on its left as rows on its right: {names}"
        fail(SpecError, "E133", message, expr.span, help=help)
    return Shape(left.rows, right.columns)


_BINARY: Mapping[tuple[str, bool, bool], _Rule] = {
    **{(each, False, False): _arithmetic for each in ("+", "-", "*", "/", "//", "**")},
    **{(each, False, False): _ordering for each in ("<", "<=", ">", ">=")},
    **{(each, False, False): _equality for each in ("==", "!=")},
    **{(each, False, False): _logic for each in ("and", "or")},
    **{(each, True, True): _elementwise for each in ("+", "-", "*")},
    ("*", False, True): _scale,
    ("*", True, False): _scale,
    ("/", True, False): _scale,
    ("@", True, True): _matmul,
}


def _join(expr: tree.Conditional, then: Type, otherwise: Type) -> Type:
    if isinstance(then, Shape) or isinstance(otherwise, Shape):
        if then != otherwise:
            message = (
                f"both sides of a condition need one shape: {_describe(then)} if true, {_describe(otherwise)} if not"
            )
            fail(SpecError, "E133", message, expr.span)
        return then
    if then.kind == otherwise.kind:
        return then if then == otherwise else Scalar(then.kind, then.optional or otherwise.optional)
    if {then.kind, otherwise.kind} == {"int", "float"}:
        return FLOAT
    _wrong(expr, f"both sides of a condition need one type: {then} if true, {otherwise} if not")


def _call(expr: tree.Call, rec: Callable[[tree.Expr], Type]) -> Type:
    known = (*SCALAR_FUNCTIONS, *MATRIX_FUNCTIONS)
    if expr.function not in known:
        help = did_you_mean(expr.function, known) or f"known functions: {', '.join(known)}"
        fail(SpecError, "E138", f"there is no function '{expr.function}'", expr.span, help=help)
    for each in expr.arguments:
        if each.name is not None:
            fail(SpecError, "E138", f"the arguments of '{expr.function}' have no names", each.span)
    values = [each.value for each in expr.arguments]
    low, high = SCALAR_FUNCTIONS.get(expr.function, (2, 2))
    if not low <= len(values) <= high:
        count = f"{low}" if low == high else f"{low} to {high}"
        message = f"'{expr.function}' takes {count} argument{'s' if high > 1 else ''}, not {len(values)}"
        fail(SpecError, "E138", message, expr.span)
    found = [rec(each) for each in values]
    if expr.function == "drop":
        if isinstance(found[0], Scalar):
            _wrong(values[0], f"'drop' takes a matrix, and '{expression.text(values[0])}' is {found[0]}")
        number(values[1], found[1], "the probability of 'drop'")
        return found[0]
    for value, type in zip(values, found, strict=True):
        number(value, type, f"'{expr.function}'")
    whole = expr.function != "sqrt" and all(isinstance(each, Scalar) and each.kind == "int" for each in found)
    return Scalar("int", dim=Dim.atom(expression.text(expr))) if whole else FLOAT
