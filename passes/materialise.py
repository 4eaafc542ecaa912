"""Evaluates an adapted weight: on tensors when merging, on nodes when a graph needs the value itself.

Both are the same few lines: `Ops` is what differs. Values have the logical shape `[out, in]`, or `[count, out, in]`
for a stack of experts.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch

from peftc.grammar import algebra
from peftc.passes.site import Site

aten = torch.ops.aten
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Ops(Protocol[T_co]):
    """How to call an operator: at once, or by making a node."""

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> T_co:
        """The result of the operator."""
        ...


class Eager:
    """Calls operators at once."""

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The result of the operator."""
        return op(*args, **kwargs)


def materialise(
    matrix: algebra.Matrix, ops: Ops[T], weight: T | None, params: Mapping[str, T], scalars: Mapping[str, T | float]
) -> T:
    """The value of an expression. Dropout does nothing here: a merged weight has none.

    `weight` may be None where the expression does not use it.
    """

    def value(each: algebra.Matrix) -> T:
        match each:
            case algebra.Weight():
                assert weight is not None, "an expression over W needs its value"
                return weight
            case algebra.Param(role):
                return params[role]
            case algebra.Scaled(scalar, operand):
                return ops.call(aten.mul.Tensor, value(operand), scalars[scalar])
            case algebra.Sum(left, right):
                return ops.call(aten.add.Tensor, value(left), value(right))
            case algebra.Product(left, right):
                return ops.call(aten.matmul.default, value(left), value(right))
            case algebra.Hadamard(left, right):
                return ops.call(aten.mul.Tensor, value(left), value(right))
            case algebra.Transposed(operand):
                return ops.call(aten.transpose.int, value(operand), -1, -2)
            case algebra.Dropped(operand, _):
                return value(operand)

    return value(matrix)


def to_logical(ops: Ops[T], weight: T, site: Site) -> T:
    """A stored weight as `[.., out, in]`."""
    return ops.call(aten.transpose.int, weight, -1, -2) if site.transposed else weight


to_stored = to_logical  # a transposition is its own inverse


def unstack(ops: Ops[T], value: T, stacked_axis: int, sizes: tuple[int, int], site: Site) -> T:
    """A parameter at a stack of experts as one matrix per expert, `[count, ., .]`; at other sites as it is.

    PEFT stores `[count * rank, in]`, experts first, and `[out, rank * count]`, experts last. `sizes` is the stored
    shape, of which the stacked axis is not used, so that a graph fits every rank.
    """
    if site.count == 1:
        return value
    if stacked_axis == 0:
        return ops.call(aten.reshape.default, value, [site.count, -1, sizes[1]])
    apart = ops.call(aten.reshape.default, value, [sizes[0], -1, site.count])
    return ops.call(aten.permute.default, apart, [2, 0, 1])
