"""Evaluates an adapted weight: on tensors when merging, on nodes when a graph needs the value itself.

Both are the same few lines: `Ops` is what differs. Values have the logical shape `[out, in]`, or `[count, out, in]`
for a stack of experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from peftc.grammar.algebra import algebra
from peftc.passes.expression.functions import LOWERINGS
from peftc.passes.expression.precision import together
from peftc.passes.expression.scene import LoweringContext, Ops
from peftc.passes.plan.site import Site

aten = torch.ops.aten
T = TypeVar("T")


@dataclass
class Evaluator(Generic[T]):
    """What the names of an expression stand for. `weight` is asked for when it is needed, and so may be a dequantize.

    At a stack of experts (`lead` is 1) every value has the experts' axis in front. Parts that occur twice are computed
    once. Dropout does nothing here: a merged weight has none; what `training` draws is drawn once. `task` is a row's.
    """

    ops: Ops[T]
    params: Mapping[str, T]
    scalars: Mapping[str, T | float]
    weight: Callable[[], T] | None = None
    weights: Callable[[], T] | None = None
    bias: T | None = None
    lead: int = 0
    training: bool = False
    task: T | None = None
    known: dict[algebra.Matrix, T] = field(default_factory=dict)

    def of(self, matrix: algebra.Matrix) -> T:
        """The value of an expression."""
        if matrix not in self.known:
            self.known[matrix] = self._value(matrix)
        return self.known[matrix]

    def _value(self, matrix: algebra.Matrix) -> T:
        ops = self.ops
        match matrix:
            case algebra.Weight():
                assert self.weight is not None, "an expression over W needs its value"
                return self.weight()
            case algebra.Weights():
                assert self.weights is not None, "the weights of all sites are known when tensors are first made"
                return self.weights()
            case algebra.Bias():
                assert self.bias is not None, "an expression over b needs its value"
                return self.bias
            case algebra.Param(role):
                return self.params[role]
            case algebra.Scaled(scalar, operand):
                return ops.call(aten.mul.Tensor, self.of(operand), self.scalars[scalar])
            case algebra.Sum(left, right):
                return ops.call(aten.add.Tensor, *self._aligned(left, right))
            case algebra.Hadamard(left, right):
                return ops.call(aten.mul.Tensor, *self._aligned(left, right))
            case algebra.Function("divide", (left, right)):
                return ops.call(aten.div.Tensor, *self._aligned(left, right))
            case algebra.Product(left, right):
                return ops.call(aten.matmul.default, *together(ops, *self._aligned(left, right)))
            case algebra.Transposed(operand):
                return ops.call(aten.transpose.int, self.of(operand), -1, -2)
            case algebra.Dropped(operand, _):
                return self.of(operand)
            case algebra.Function(name, operands, options):
                values = [self.of(each) for each in operands]
                scene = LoweringContext(ops, self.lead, self._example(), self.training, self.task)
                return LOWERINGS[name](scene, values, options)

    def _aligned(self, left: algebra.Matrix, right: algebra.Matrix) -> tuple[T, T]:
        """Two values for an operator that broadcasts; at a stack the experts' axes have to meet."""
        first, second = self.of(left), self.of(right)
        if self.lead:
            axes = max(self.ops.tensor(each).dim() for each in (first, second))
            first, second = self._spread(first, axes), self._spread(second, axes)
        return first, second

    def _spread(self, value: T, axes: int) -> T:
        for _ in range(axes - self.ops.tensor(value).dim()):
            value = self.ops.call(aten.unsqueeze.default, value, self.lead)
        return value

    def _example(self) -> T:
        """A value of the adapter's type and device."""
        for value in self.params.values():
            if self.ops.tensor(value).is_floating_point():
                return value
        assert self.weight is not None, "nothing to take a type from"
        return self.of(algebra.Weight())


def to_logical(ops: Ops[T], weight: T, site: Site) -> T:
    """A stored weight as `[.., out, in]`, with the scale that its module applies."""
    if site.scale != 1.0:
        weight = ops.call(aten.mul.Tensor, weight, site.scale)
    if site.kernel:
        return ops.call(aten.reshape.default, weight, [site.out_features, -1])
    return ops.call(aten.transpose.int, weight, -1, -2) if site.transposed else weight


def to_stored(ops: Ops[T], value: T, site: Site) -> T:
    """`[.., out, in]` as the site stores it. Of a convolution `out` may be other than the weight's own."""
    if site.kernel:
        return ops.call(aten.reshape.default, value, [-1, site.channels, *site.kernel])
    return ops.call(aten.transpose.int, value, -1, -2) if site.transposed else value


def unstack(ops: Ops[T], value: T, stacked_axis: int | None, shared: bool, site: Site) -> T:
    """A tensor at a stack of experts with the experts' axis in front; at other sites as it is.

    PEFT stores `[count * rank, in]`, experts first, and `[out, rank * count]`, experts last. Only the size that is not
    stacked is used, so that a graph fits every rank. What has an axis for the experts (None) has it in front already.
    """
    if site.count == 1 or (stacked_axis is None and not shared):
        return value
    if shared:
        return ops.call(aten.unsqueeze.default, value, 0)
    sizes = ops.tensor(value).shape
    if stacked_axis == 0:
        return ops.call(aten.reshape.default, value, [site.count, -1, int(sizes[1])])
    apart = ops.call(aten.reshape.default, value, [int(sizes[0]), -1, site.count])
    return ops.call(aten.permute.default, apart, [2, 0, 1])


def restack(value: torch.Tensor, stacked_axis: int | None, site: Site) -> torch.Tensor:
    """The inverse of `unstack`: a value with the experts' axis in front, as it is stored."""
    if site.count == 1 or stacked_axis is None or stacked_axis == 0:
        return value
    return value.permute(1, 2, 0)
