"""Types of expressions: scalars and tensors, and a table of what each operator and function takes and gives."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from peftc.grammar.algebra.functions import (
    FUNCTIONS,
    MAX_AXES,
    MisfitError,
    Sizes,
    broadcast,
    matmul,
    result,
    transposed,
)
from peftc.grammar.algebra.shapes import Dim, Shape, differ
from peftc.grammar.diagnostics import SpecError, did_you_mean, fail
from peftc.grammar.method.scalar import LEN, OF_LISTS, ROUNDING, SCALAR_FUNCTIONS
from peftc.grammar.syntax import expression, tree

NAMED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "text": "a text",
    "ints": "a list of whole numbers",
}


@dataclass(frozen=True)
class Scalar:
    """One number, flag, text or list of numbers, known once the hyperparameters have values.

    `choices` are the texts it can be, `dim` its size in normal form where it is a whole number made of sizes.
    """

    kind: str  # int, float, bool, text, ints
    optional: bool = False
    choices: tuple[str, ...] = ()
    dim: Dim | None = None

    def __str__(self) -> str:
        name = NAMED[self.kind]
        return f"{name} or none" if self.optional else name


Type = Scalar | Shape

INT, FLOAT, BOOL, TEXT, INTS = Scalar("int"), Scalar("float"), Scalar("bool"), Scalar("text"), Scalar("ints")

DROP = "drop"

_Rule = Callable[[tree.Binary, Type, Type], Type]


# Known to the methods of this project that cannot do without, and in no page for those who write their own.
_UNTOLD = frozenset({"Ws", "category", "members", "tallest"})
_ACTIVATIONS = frozenset({"x", "X", "h", "y", "input", "inputs", "hidden_states", "activation", "activations"})
_LAYERS = {"in_features": "in", "out_features": "out", "weight": "W", "w": "W", "bias": "b", "r": "rank"}


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
        case tree.Sequence(items):
            for each in items:
                need(each, rec(each), INT, "a list")
            return INTS
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
            return _fitting(expr, f"'{expression.text(operand)}' is {found}", transposed, found.sizes)
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
            sides = (
                type_of(then, _narrowed(names, test, True), used),
                type_of(otherwise, _narrowed(names, test, False), used),
            )
            return _join(expr, *sides)
        case tree.Binary("==" | "!=", left, tree.Null()):
            found = rec(left)
            if isinstance(found, Shape) or not found.optional:
                _wrong(expr, f"'{expression.text(left)}' is never none")
            return BOOL
        case tree.Binary(operator, left, right):
            first, second = rec(left), rec(right)
            key = (operator, isinstance(first, Shape), isinstance(second, Shape))
            if key not in _BINARY:
                _wrong(expr, f"'{operator}' does not take {_describe(first)} and {_describe(second)}", _advice(*key))
            return _BINARY[key](expr, first, second)


def _narrowed(names: Mapping[str, Type], test: tree.Expr, holds: bool) -> Mapping[str, Type]:
    """The names, with what `x == none` and `x != none` say of one: where it is not none it is as any other."""
    match test:
        case tree.Binary(sign, tree.Name(name), tree.Null()) if sign == ("!=" if holds else "=="):
            found = names[name]
            return {**names, name: replace(found, optional=False)} if isinstance(found, Scalar) else names
        case _:
            return names


def unknown_name(expr: tree.Name, names: Iterable[str]) -> NoReturn:
    """Raise E130."""
    known = sorted(set(names) - _UNTOLD)
    help = _slip(expr.id, known) or did_you_mean(expr.id, known) or f"known here: {', '.join(known)}"
    fail(SpecError, "E130", f"'{expr.id}' is not known here", expr.span, help=help)


def _slip(name: str, known: Sequence[str]) -> str:
    """Help for what a layer's own code has names for, in a method's definition."""
    if "W" not in known:
        return ""
    if name in _ACTIVATIONS:
        return "a method sees no input: W' and b' are formulas over W, b and its own tensors, whatever goes through"
    if _LAYERS.get(name) in known:
        return f"it is '{_LAYERS[name]}' here"
    return ""


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
    return f"a tensor {found}" if isinstance(found, Shape) else str(found)


def _fitting(expr: tree.Expr, operands: str, rule: Callable[..., Sizes], *sizes: Sizes, help: str = "") -> Shape:
    """The shape a rule gives. Raises E133, naming the operands, where they do not go together."""
    try:
        return Shape(rule(*sizes))
    except MisfitError as misfit:
        fail(SpecError, "E133", f"{misfit}: {operands}", expr.span, help=help)


def _advice(operator: str, left: bool, right: bool) -> str:
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
            return Scalar("int", dim=Dim.atom(f"({left.dim}) {expr.operator} ({right.dim})"))


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
            fail(
                SpecError, "E151", f"{expression.quoted(other.value)} is not one of the choices", other.span, help=help
            )
    return BOOL


def _logic(expr: tree.Binary, left: Type, right: Type) -> Type:
    need(expr.left, left, BOOL, f"'{expr.operator}'")
    need(expr.right, right, BOOL, f"'{expr.operator}'")
    return BOOL


def _elementwise(expr: tree.Binary, left: Type, right: Type) -> Type:
    assert isinstance(left, Shape)
    assert isinstance(right, Shape)
    return _fitting(expr, _operands(expr, left, right), broadcast, left.sizes, right.sizes)


def _scale(expr: tree.Binary, left: Type, right: Type) -> Type:
    if isinstance(left, Shape):
        number(expr.right, right, f"'{expr.operator}' with a tensor")
        return left
    number(expr.left, left, f"'{expr.operator}' with a tensor")
    return right


def _matmul(expr: tree.Binary, left: Type, right: Type) -> Type:
    assert isinstance(left, Shape)
    assert isinstance(right, Shape)
    turned = len(left.sizes) == len(right.sizes) == 2 and left.sizes[0] == right.sizes[1]
    swapped = tree.Binary("@", expr.right, expr.left)
    help = f"did you mean {expression.text(swapped)}?" if turned else ""
    return _fitting(expr, _operands(expr, left, right), matmul, left.sizes, right.sizes, help=help)


def _operands(expr: tree.Binary, left: Shape, right: Shape) -> str:
    return f"{expression.text(expr.left)} is {left}, {expression.text(expr.right)} is {right}"


_BINARY: Mapping[tuple[str, bool, bool], _Rule] = {
    **{(each, False, False): _arithmetic for each in ("+", "-", "*", "/", "//", "%", "**")},
    **{(each, False, False): _ordering for each in ("<", "<=", ">", ">=")},
    **{(each, False, False): _equality for each in ("==", "!=")},
    **{(each, False, False): _logic for each in ("and", "or")},
    **{(each, True, True): _elementwise for each in ("+", "-", "*", "/")},
    **{(each, False, True): _scale for each in ("+", "-", "*", "/")},
    **{(each, True, False): _scale for each in ("+", "-", "*", "/")},
    ("@", True, True): _matmul,
}


def _join(expr: tree.Conditional, then: Type, otherwise: Type) -> Type:
    if isinstance(then, Shape) and isinstance(otherwise, Shape) and _alike(then, otherwise):
        return then
    if isinstance(then, Shape) or isinstance(otherwise, Shape):
        message = f"both sides of a condition need one shape: {_describe(then)} if true, {_describe(otherwise)} if not"
        fail(SpecError, "E133", message, expr.span)
    if then.kind == otherwise.kind:
        return then if then == otherwise else Scalar(then.kind, then.optional or otherwise.optional)
    if {then.kind, otherwise.kind} == {"int", "float"}:
        return FLOAT
    _wrong(expr, f"both sides of a condition need one type: {then} if true, {otherwise} if not")


def _call(expr: tree.Call, rec: Callable[[tree.Expr], Type]) -> Type:
    known = sorted({*SCALAR_FUNCTIONS, *FUNCTIONS, DROP})
    if expr.function not in known:
        help = did_you_mean(expr.function, known) or f"known functions: {', '.join(known)}"
        fail(SpecError, "E138", f"there is no function '{expr.function}'", expr.span, help=help)
    for each in expr.arguments:
        if each.name is not None:
            fail(SpecError, "E138", f"the arguments of '{expr.function}' have no names", each.span)
    values = [each.value for each in expr.arguments]
    if expr.function == DROP:
        return _drop(expr, values, rec)
    if expr.function in FUNCTIONS and not (expr.function in SCALAR_FUNCTIONS and _is_number(values, rec)):
        return _tensor_call(expr, values, rec)
    low, high, _ = SCALAR_FUNCTIONS[expr.function]
    found = [rec(each) for each in values]
    if expr.function == LEN or (len(found) == 1 and found[0] == INTS and expr.function in OF_LISTS):
        need(values[0], found[0], INTS, f"'{expr.function}'")
        return Scalar("int", dim=Dim.atom(expression.text(expr)))
    _count(expr, len(values), low, high)
    for value, type in zip(values, found, strict=True):
        number(value, type, f"'{expr.function}'")
    whole = expr.function in ROUNDING or (
        expr.function != "sqrt" and all(isinstance(each, Scalar) and each.kind == "int" for each in found)
    )
    return Scalar("int", dim=Dim.atom(expression.text(expr))) if whole else FLOAT


def _is_number(values: Sequence[tree.Expr], rec: Callable[[tree.Expr], Type]) -> bool:
    return bool(values) and isinstance(rec(values[0]), Scalar)


def _count(expr: tree.Call, given: int, low: int, high: int) -> None:
    if not low <= given <= high:
        count = f"{low}" if low == high else f"{low} to {high}"
        message = f"'{expr.function}' takes {count} argument{'s' if high > 1 else ''}, not {given}"
        fail(SpecError, "E138", message, expr.span)


def _drop(expr: tree.Call, values: Sequence[tree.Expr], rec: Callable[[tree.Expr], Type]) -> Type:
    _count(expr, len(values), 2, 2)
    found = rec(values[0])
    if isinstance(found, Scalar):
        _wrong(values[0], f"'drop' takes a tensor, and '{expression.text(values[0])}' is {found}")
    number(values[1], rec(values[1]), "the probability of 'drop'")
    return found


def _tensor_call(expr: tree.Call, values: Sequence[tree.Expr], rec: Callable[[tree.Expr], Type]) -> Type:
    function = FUNCTIONS[expr.function]
    wanted = function.operands + len(function.options)
    _count(expr, len(values), wanted, wanted)
    operands: list[Sizes] = []
    told: list[str] = []
    for value in values[: function.operands]:
        found = rec(value)
        if isinstance(found, Scalar):
            _wrong(value, f"'{expr.function}' takes a tensor, and '{expression.text(value)}' is {found}")
        operands.append(found.sizes)
        told.append(f"{expression.text(value)} is {found}")
    options = [
        _option(expr, name, kind, value, rec)
        for (name, kind), value in zip(function.options, values[function.operands :], strict=True)
    ]
    names = ", ".join(told) or expression.text(expr)
    return _fitting(expr, names, lambda: result(expr.function, operands, options))


def _option(expr: tree.Call, name: str, kind: str, value: tree.Expr, rec: Callable[[tree.Expr], Type]) -> object:
    what = f"'{name}' of '{expr.function}'"
    if kind == "sizes":
        if not isinstance(value, tree.Sequence) or not 1 <= len(value.items) <= MAX_AXES:
            _wrong(value, f"{what} is a list of 1 to {MAX_AXES} whole numbers, as in [out, rank]")
        return tuple(size_of(each, rec(each), what) for each in value.items)
    if kind == "int":
        return size_of(value, rec(value), what)
    if kind == "text":
        need(value, rec(value), TEXT, what)
        return value.value if isinstance(value, tree.Text) else None
    number(value, rec(value), what)
    return None


def size_of(expr: tree.Expr, found: Type, what: str = "a size") -> Dim:
    """The size a whole number stands for. Raises E132 for anything else."""
    if not isinstance(found, Scalar) or found.kind != "int" or found.optional:
        _wrong(expr, f"{what} is a whole number, and '{expression.text(expr)}' is {_describe(found)}")
    return found.dim or Dim.atom(f"({expression.text(expr)})")


def _alike(left: Shape, right: Shape) -> bool:
    return len(left.sizes) == len(right.sizes) and not any(map(differ, left.sizes, right.sizes))
