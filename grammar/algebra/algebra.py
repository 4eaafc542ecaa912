"""The closed form of an adapted weight: what a method's body means once its hyperparameters have values.

A matrix is an immutable tree over `W`, `b`, the site's parameters and named scalars. (It may have one to four axes; the
values of `W'` and of most parts of it are matrices.) The tree is the *structure* of an
adapter: two adapters whose trees are equal differ only in tensors and scalar values, so a graph made for one serves
the other. `W` is `[out, in]` (for a stack of experts `[experts, out, in]`), whatever module stores it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from peftc.grammar.algebra.functions import TASK


@dataclass(frozen=True)
class Weight:
    """The base weight `W`, opaque until something needs its value."""


@dataclass(frozen=True)
class Weights:
    """`Ws`, the base weights of all sites of the category, `[members, rows, in]`; zero below those with fewer rows."""

    members: int
    rows: int


@dataclass(frozen=True)
class Bias:
    """The base bias `b`, of a site that has one."""


@dataclass(frozen=True)
class Param:
    """A parameter or constant of the method, by role (`A`)."""

    role: str


@dataclass(frozen=True)
class Scaled:
    """`scalar * operand`; the scalar is a name whose value the adapter holds."""

    scalar: str
    operand: "Matrix"


@dataclass(frozen=True)
class Sum:
    """`left + right`."""

    left: "Matrix"
    right: "Matrix"


@dataclass(frozen=True)
class Product:
    """`left @ right`."""

    left: "Matrix"
    right: "Matrix"


@dataclass(frozen=True)
class Hadamard:
    """`left * right`, elementwise; sizes of 1 stretch, as in a sum."""

    left: "Matrix"
    right: "Matrix"


@dataclass(frozen=True)
class Transposed:
    """`operand.T`."""

    operand: "Matrix"


@dataclass(frozen=True)
class Dropped:
    """`drop(operand, p)`: while training, the activation that meets `operand` passes through dropout first."""

    operand: "Matrix"
    p: float


Option = int | float | str | tuple[int, ...]


@dataclass(frozen=True)
class Function:
    """A function of `peftc.grammar.algebra.functions` with its options' values; or `divide`, `reciprocal`, `shift`.

    These three are what `A / B`, `1 / A` and `A + number` stand for.
    """

    name: str
    operands: tuple["Matrix", ...]
    options: tuple[Option, ...] = ()


Matrix = Weight | Weights | Bias | Param | Scaled | Sum | Product | Hadamard | Transposed | Dropped | Function


def children(matrix: Matrix) -> tuple[Matrix, ...]:
    """The direct operands, left to right."""
    match matrix:
        case Sum(left, right) | Product(left, right) | Hadamard(left, right):
            return (left, right)
        case Scaled(_, operand) | Transposed(operand) | Dropped(operand, _):
            return (operand,)
        case Function(_, operands):
            return operands
        case _:
            return ()


def walk(matrix: Matrix) -> Iterator[Matrix]:
    """The tree in preorder."""
    yield matrix
    for child in children(matrix):
        yield from walk(child)


def task_count(*matrices: Matrix | None) -> int:
    """How many tasks a call may give its rows for these, the fewest that any part is for; 0 where they ask for none."""
    nodes = (each for matrix in matrices if matrix is not None for each in walk(matrix))
    counts = [int(each.options[0]) for each in nodes if isinstance(each, Function) and each.name == TASK]  # type: ignore[arg-type]
    return min(counts, default=0)


def rebuild(matrix: Matrix, change: Callable[[Matrix], Matrix]) -> Matrix:
    """The same operator over changed operands."""
    match matrix:
        case Sum(left, right) | Product(left, right) | Hadamard(left, right):
            return replace(matrix, left=change(left), right=change(right))
        case Scaled(_, operand) | Transposed(operand) | Dropped(operand, _):
            return replace(matrix, operand=change(operand))
        case Function(_, operands) if operands:
            return replace(matrix, operands=tuple(map(change, operands)))
        case _:
            return matrix


def without_bias(matrix: Matrix) -> Matrix | None:
    """The matrix where `b` is zero; None where nothing is left of it."""
    parts = [without_bias(each) for each in children(matrix)]
    match matrix:
        case Bias():
            return None
        case Sum():
            left, right = parts
            return Sum(left, right) if left and right else left or right
        case _ if None in parts:
            return None
        case _:
            remaining = iter(parts)
            return rebuild(matrix, lambda _: next(remaining))  # type: ignore[arg-type, return-value]


def text(matrix: Matrix) -> str:
    """The expression as a person would write it."""
    match matrix:
        case Weight():
            return "W"
        case Weights():
            return "Ws"
        case Bias():
            return "b"
        case Param(role):
            return role
        case Scaled(scalar, operand):
            return f"{scalar} * {_factor(operand)}"
        case Sum(left, right):
            return f"{text(left)} + {text(right)}"
        case Product(left, right):
            return f"{_factor(left)} @ {_factor(right)}"
        case Hadamard(left, right):
            return f"{_factor(left)} * {_factor(right)}"
        case Transposed(operand):
            return f"{_factor(operand)}.T"
        case Dropped(operand, p):
            return f"drop({text(operand)}, {p:g})"
        case Function("divide", (left, right)):
            return f"{_factor(left)} / {_factor(right)}"
        case Function("reciprocal", (operand,)):
            return f"1 / {_factor(operand)}"
        case Function("shift", (operand,), (number,)):
            return f"{text(operand)} + {number:g}"
        case Function(name, operands, options):
            return f"{name}({', '.join([*map(text, operands), *map(_option, options)])})"


def _option(option: Option) -> str:
    match option:
        case tuple():
            return f"[{', '.join(map(str, option))}]"
        case str():
            return f'"{option}"'
        case _:
            return f"{option:g}"


def _factor(matrix: Matrix) -> str:
    compound = isinstance(matrix, Sum | Product | Hadamard | Scaled)
    compound |= isinstance(matrix, Function) and matrix.name in ("divide", "reciprocal", "shift")
    return f"({text(matrix)})" if compound else text(matrix)
