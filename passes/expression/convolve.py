"""How an expression for a convolution's weight meets what the convolution reads, as rewrite laws."""

from dataclasses import dataclass, replace

import torch
from torch import fx
from torch._ops import OpOverload

from peftc.grammar.algebra import algebra
from peftc.passes.expression.apply import Apply

aten = torch.ops.aten
CONVOLUTIONS: tuple[OpOverload, ...] = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
)


@dataclass(frozen=True)
class Patches:
    """What a convolution sees: at every place of its output, the `[in]` numbers under its kernel.

    `channels` are those a group reads, None for a kernel of ones; `options` are stride, padding, dilation and groups.
    """

    node: fx.Node
    op: OpOverload
    kernel: tuple[int, ...]
    channels: int | None = None
    groups: int = 1
    options: tuple[object, ...] = ()

    def onward(self, node: fx.Node) -> "Patches":
        """What was made of them, as the next factor of a product sees it."""
        return Patches(node, self.op.overloadpacket.default, (1,) * len(self.kernel))


@dataclass(frozen=True)
class Convolve:
    """Lowers expressions at one convolution."""

    apply: Apply

    def __call__(self, matrix: algebra.Matrix, x: Patches) -> fx.Node:
        """The node of `matrix` applied to what the convolution reads."""
        emit = self.apply.emit
        match matrix:
            # conv(x, P + Q) = conv(x, P) + conv(x, Q), where neither is stretched
            case algebra.Sum(left, right) if self.apply.of(left) == self.apply.of(right) and self._drops(matrix):
                return emit.call(aten.add.Tensor, self(left, x), self(right, x))
            # conv(x, s * P) = s * conv(x, P), of a product P @ Q after the small factor
            case algebra.Scaled(scalar, algebra.Product(left, right)) if self._parts(matrix.operand, x):
                return self(left, x.onward(self._scale(self(right, x), scalar)))
            case algebra.Scaled(scalar, operand):
                return self._scale(self(operand, x), scalar)
            # conv(x, P @ Q) = conv(conv(x, Q), P), P of size one; a group's P would see only its part of the first
            case algebra.Product(left, right) if self._parts(matrix, x):
                return self(left, x.onward(self(right, x)))
            # conv(x, drop(P, p)) = conv(dropout(x, p), P)
            case algebra.Dropped(operand, p) if self.apply.training:
                return self(operand, replace(x, node=emit.call(aten.dropout.default, x.node, p, True)))
            case algebra.Dropped(operand, _):
                return self(operand, x)
            case algebra.Product() if isinstance(outer := drop_outside(matrix), algebra.Dropped):
                return self(outer, x)
            # conv(x, E) = conv(x, kernels of the value of E)
            case _:
                value = self.apply.value(matrix)
                node = self.apply.cast(x.node, value.meta["val"].dtype)
                return emit.call(x.op, node, self._kernels(value, x), None, *x.options)

    def _scale(self, node: fx.Node, scalar: str) -> fx.Node:
        return self.apply.emit.call(aten.mul.Tensor, node, self.apply.values.scalars[scalar])

    def _parts(self, product: algebra.Matrix, x: Patches) -> bool:
        """Whether a product's factors can convolve one after the other."""
        return x.groups == 1 and len(self.apply.of(product)) == 2

    def _drops(self, matrix: algebra.Matrix) -> bool:
        dropped = any(isinstance(each, algebra.Dropped) for each in algebra.walk(matrix))
        return self.apply.training and dropped

    def bias(self, value: fx.Node, x: Patches) -> fx.Node:
        """A bias `[out]` as it is added to what a convolution gives."""
        return self.apply.emit.call(aten.reshape.default, value, [-1, *(1 for _ in x.kernel)])

    def _kernels(self, value: fx.Node, x: Patches) -> fx.Node:
        """`[rows, in]` as `[rows, channels, *kernel]`."""
        if x.channels is not None:
            return self.apply.emit.call(aten.reshape.default, value, [-1, x.channels, *x.kernel])
        for _ in x.kernel:
            value = self.apply.emit.call(aten.unsqueeze.default, value, -1)
        return value


def drop_outside(matrix: algebra.Matrix) -> algebra.Matrix:
    """P @ drop(Q, p)  ->  drop(P @ Q, p): what meets either is the activation that meets Q."""
    if isinstance(matrix, algebra.Product):
        right = drop_outside(matrix.right)
        if isinstance(right, algebra.Dropped):
            return algebra.Dropped(algebra.Product(matrix.left, right.operand), right.p)
    return matrix


def is_low_rank(matrix: algebra.Matrix) -> bool:
    """Whether it is a product up to factors: cheap to apply, and to differentiate, a factor at a time."""
    match matrix:
        case algebra.Scaled(_, operand) | algebra.Dropped(operand, _):
            return is_low_rank(operand)
        case _:
            return isinstance(matrix, algebra.Product)
