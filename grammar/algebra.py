"""The closed form of an adapted weight: what a method's body means once its hyperparameters have values.

A matrix is an immutable tree over `W`, the site's parameters and named scalars. The tree is the *structure* of an
adapter: two adapters whose trees are equal differ only in tensors and scalar values, so a graph made for one serves
the other. `W` is `[out, in]` (for a stack of experts `[experts, out, in]`), whatever module stores it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Weight:
    """The base weight `W`, opaque until something needs its value."""


@dataclass(frozen=True)
class Param:
    """A trainable parameter of the method, by role (`A`)."""

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
    """`left * right`, elementwise."""

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


Matrix = Weight | Param | Scaled | Sum | Product | Hadamard | Transposed | Dropped


def children(matrix: Matrix) -> tuple[Matrix, ...]:
    """The direct operands, left to right."""
    match matrix:
        case Sum(left, right) | Product(left, right) | Hadamard(left, right):
            return (left, right)
        case Scaled(_, operand) | Transposed(operand) | Dropped(operand, _):
            return (operand,)
        case _:
            return ()


def walk(matrix: Matrix) -> Iterator[Matrix]:
    """The tree in preorder."""
    yield matrix
    for child in children(matrix):
        yield from walk(child)


def rebuild(matrix: Matrix, change: Callable[[Matrix], Matrix]) -> Matrix:
    """The same operator over changed operands."""
    match matrix:
        case Sum(left, right) | Product(left, right) | Hadamard(left, right):
            return replace(matrix, left=change(left), right=change(right))
        case Scaled(_, operand) | Transposed(operand) | Dropped(operand, _):
            return replace(matrix, operand=change(operand))
        case _:
            return matrix


def text(matrix: Matrix) -> str:
    """The expression as a person would write it."""
    match matrix:
        case Weight():
            return "W"
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


def _factor(matrix: Matrix) -> str:
    return f"({text(matrix)})" if isinstance(matrix, Sum | Product | Hadamard | Scaled) else text(matrix)
