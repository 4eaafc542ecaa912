"""The sizes of a closed form at a site, in numbers: where a rule meets a weight it does not fit is found here."""

import math
from collections.abc import Mapping

from peftc.grammar.algebra import algebra
from peftc.grammar.algebra.functions import MisfitError, Sizes, broadcast, matmul, result, transposed
from peftc.grammar.algebra.shapes import Dim

Numbers = tuple[int, ...]


def sizes_of(matrix: algebra.Matrix, roles: Mapping[str, Numbers], weight: Numbers) -> Numbers:
    """The sizes of an expression over tensors of these sizes. Raises MisfitError, naming the part that does not fit."""
    return _numbers(_sizes(matrix, {role: _constant(sizes) for role, sizes in roles.items()}, _constant(weight)))


def largest_part(matrix: algebra.Matrix, roles: Mapping[str, Numbers], weight: Numbers) -> int:
    """How many numbers the largest value holds that is met while an expression is evaluated."""
    tensors = {role: _constant(sizes) for role, sizes in roles.items()}
    base, largest = _constant(weight), 0

    def measured(each: algebra.Matrix) -> Sizes:
        nonlocal largest
        found = _applied(each, [measured(part) for part in algebra.children(each)], tensors, base)
        largest = max(largest, math.prod(_numbers(found)))
        return found

    measured(matrix)
    return largest


def _sizes(matrix: algebra.Matrix, roles: Mapping[str, Sizes], weight: Sizes) -> Sizes:
    return _applied(matrix, [_sizes(each, roles, weight) for each in algebra.children(matrix)], roles, weight)


def _applied(matrix: algebra.Matrix, operands: list[Sizes], roles: Mapping[str, Sizes], weight: Sizes) -> Sizes:
    try:
        match matrix:
            case algebra.Weight():
                return weight
            case algebra.Weights(members, rows):
                return (*_constant((members, rows)), weight[-1])
            case algebra.Bias():
                return weight[-2:-1]
            case algebra.Param(role):
                return roles[role]
            case algebra.Sum() | algebra.Hadamard() | algebra.Function("divide"):
                return broadcast(*operands)
            case algebra.Product():
                return matmul(*operands)
            case algebra.Transposed():
                return transposed(*operands)
            case algebra.Scaled() | algebra.Dropped() | algebra.Function("shift" | "reciprocal"):
                return operands[0]
            case algebra.Function(name, _, options):
                return result(name, operands, [_option(each) for each in options])
    except MisfitError as misfit:
        if misfit.args[1:]:
            raise
        told = ", ".join(
            f"{algebra.text(each)} is {list(_numbers(sizes))}"
            for each, sizes in zip(algebra.children(matrix), operands, strict=True)
        )
        raise MisfitError(f"{misfit}: {told}", "told") from misfit


def _option(option: algebra.Option) -> Dim | Sizes | float | str:
    match option:
        case tuple():
            return _constant(option)
        case int():
            return Dim.constant(option)
        case _:
            return option


def _constant(sizes: Numbers) -> Sizes:
    return tuple(Dim.constant(each) for each in sizes)


def _numbers(sizes: Sizes) -> Numbers:
    numbers = tuple(each.value for each in sizes)
    assert None not in numbers, sizes
    return numbers  # type: ignore[return-value]
