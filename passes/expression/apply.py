"""apply(E, x): how an expression for a weight meets an activation, as rewrite laws.

Each law is a case of `Apply.__call__`, its equation in front. Where no law pushes `x` through, the expression is
materialised: `apply(E, x) = linear(x, materialise(E))` always holds.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from peftc.grammar.algebra import algebra
from peftc.grammar.algebra.measure import sizes_of
from peftc.passes.expression.materialise import Evaluator
from peftc.passes.ir.emit import Emit
from peftc.passes.plan.site import Site

aten = torch.ops.aten
WEIGHT = algebra.Weight()


@dataclass(frozen=True)
class Dense:
    """An activation `[.., in]`."""

    node: fx.Node


@dataclass(frozen=True)
class OneHot:
    """The activation an embedding sees: rows of the identity, given by their index. `options` are padding_idx etc."""

    ids: fx.Node
    options: tuple[object, ...]


Activation = Dense | OneHot


class DropoutError(Exception):
    """A site's weight is used in a way that leaves no activation to drop."""

    def __init__(self, site: Site, reason: str):
        self.site, self.reason = site, reason
        super().__init__(f"{site.name}: {reason}")


@dataclass(frozen=True)
class Apply:
    """Lowers expressions at one site. `base` emits the base's operator on another activation, without its bias.

    `sizes` are those of the parameters, `weight_sizes` (out, in).
    """

    emit: Emit
    values: Evaluator[fx.Node]
    base: Callable[[Activation], fx.Node]
    sizes: Mapping[str, tuple[int, ...]]
    weight_sizes: tuple[int, int]
    site: Site
    training: bool
    known: dict[tuple[algebra.Matrix, Activation], fx.Node] = field(default_factory=dict)

    def __call__(self, matrix: algebra.Matrix, x: Activation) -> fx.Node:
        """The node of `matrix` applied to `x`, `[.., out]`."""
        if (matrix, x) not in self.known:
            self.known[matrix, x] = self._pushed(matrix, x)
        return self.known[matrix, x]

    def _pushed(self, matrix: algebra.Matrix, x: Activation) -> fx.Node:
        match matrix, x:
            # apply(W, x) = the base linear, quantized or not
            case algebra.Weight(), _:
                return self.base(x)
            # apply(P + Q, x) = apply(P, x) + apply(Q, x), where neither is stretched
            case algebra.Sum(left, right), _ if self.of(left) == self.of(right):
                return self.emit.call(aten.add.Tensor, self(left, x), self(right, x))
            # apply(s * (P @ Q), x) = apply(P, s * apply(Q, x)): the product's inner size is the small one
            case algebra.Scaled(scalar, algebra.Product(left, right)), _ if _chains(left, x) and _is_narrow(right):
                return self(left, Dense(self._scale(self(right, x), scalar)))
            # apply(s * P, x) = s * apply(P, x)
            case algebra.Scaled(scalar, operand), _:
                return self._scale(self(operand, x), scalar)
            # apply(P @ Q, x) = apply(P, apply(Q, x)); W meets rows of the identity as an embedding, or not at all
            case algebra.Product(left, right), _ if len(self.of(matrix)) == 2 and _chains(left, x):
                return self(left, Dense(self(right, x)))
            # apply(drop(P, p), x) = apply(P, dropout(x, p)); a row of the identity has nothing to drop
            case algebra.Dropped(operand, p), Dense(node) if self.training:
                return self(operand, Dense(self.emit.call(aten.dropout.default, node, p, True)))
            case algebra.Dropped(operand, _), _:
                return self(operand, x)
            # apply(v * P, x) = v * apply(P, x) for a column v; apply(P * v, x) = apply(P, v * x) for a row v
            case algebra.Hadamard(left, right), _ if self._pushes_scale(left, right, x):
                return self._scaled_by(left, right, x)
            case algebra.Hadamard(left, right), _ if self._pushes_scale(right, left, x):
                return self._scaled_by(right, left, x)
            case algebra.Function("divide", (operand, by)), _ if self._pushes_scale(by, operand, x):
                return self._scaled_by(algebra.Function("reciprocal", (by,)), operand, x)
            case algebra.Transposed(operand), _ if (turned := transposed(operand)) is not None:
                return self(turned, x)
            case algebra.Transposed(algebra.Function("block_diag", (blocks,))), Dense(node):
                return self._block_diag(algebra.Transposed(blocks), node)
            # apply(block_diag(B), x) = block-wise matmul
            case algebra.Function("block_diag", (blocks,)), Dense(node):
                return self._block_diag(blocks, node)
            # apply(diag(v), x) = v * x
            case algebra.Function("diag", (entries,)), Dense(node):
                return self._times(node, entries)
            # apply(kron(C, D), x) = two small matmuls
            case algebra.Function("kron", (left, right)), Dense(node):
                return self._kron(left, right, node)
            # apply(cycle(P, n, 1), x) = apply(P, the sum of x's stretches)
            case algebra.Function("cycle", (operand,), (size, 1)), Dense(node):
                assert isinstance(size, int)
                return self._cycle(operand, size, node)
            # apply(tile(P, [1, n]), x) = apply(P, the sum of x's stretches)
            case algebra.Function("tile", (operand,), ((1, _),)), Dense(node) if len(self.of(operand)) == 2:
                return self._cycle(operand, self.of(matrix)[1], node)
            case algebra.Function("eye"), Dense(node):
                return node
            # apply(A, one_hot(i)) = A[:, i]; apply(E, x) = linear(x, materialise(E)) for everything else
            case _, OneHot(ids, options):
                columns = self.emit.call(aten.transpose.int, self.value(matrix), -1, -2)
                return self.emit.call(aten.embedding.default, columns, ids, *options)
            case _, Dense(node):
                return self._linear(node, self.value(matrix))

    def whole(self, matrix: algebra.Matrix) -> algebra.Matrix:
        """A term of W', as large as W even where it was written as a row, a column or a number."""
        if isinstance(matrix, algebra.Dropped):
            return algebra.Dropped(self.whole(matrix.operand), matrix.p)
        sizes, wanted = self.of(matrix), self.weight_sizes
        if sizes == wanted:
            return matrix
        flat = (1,) * (2 - len(sizes)) + sizes
        counts = tuple(size // own for size, own in zip(wanted, flat, strict=True))
        return algebra.Function("tile", (algebra.Function("reshape", (matrix,), (flat,)),), (counts,))

    def value(self, matrix: algebra.Matrix) -> fx.Node:
        """The logical value of an expression. Raises DropoutError where that would ignore a dropout in training."""
        if self.training and any(isinstance(each, algebra.Dropped) for each in algebra.walk(matrix)):
            raise DropoutError(self.site, "the expression needs the value of what is dropped from")
        return self.values.of(matrix)

    def promoted(self, weight: fx.Node) -> fx.Node:
        """The base's tensor in the type its adapter computes in."""
        kinds = [each.meta["val"].dtype for each in self.values.params.values()]
        wider = [each for each in kinds if each.is_floating_point]
        return self.cast(weight, functools.reduce(torch.promote_types, wider, weight.meta["val"].dtype))

    def of(self, matrix: algebra.Matrix) -> tuple[int, ...]:
        """The sizes of an expression."""
        return sizes_of(matrix, self.sizes, self.weight_sizes)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The node in this type, itself if it already is."""
        return self.emit.cast(node, dtype)

    def _linear(self, x: fx.Node, weight: fx.Node) -> fx.Node:
        # As PEFT does: a float32 adapter on a bfloat16 base computes its part in float32.
        return self.emit.call(aten.linear.default, self.cast(x, weight.meta["val"].dtype), weight)

    def _scale(self, node: fx.Node, scalar: str) -> fx.Node:
        return self.emit.call(aten.mul.Tensor, node, self.values.scalars[scalar])

    def _pushes_scale(self, scale: algebra.Matrix, operand: algebra.Matrix, x: Activation) -> bool:
        whole, sizes = self.of(operand), self.of(scale)
        if len(whole) != 2:
            return False
        column, row = (whole[0], 1), (1, whole[1])
        return sizes == column or (isinstance(x, Dense) and sizes in (row, row[1:]))

    def _scaled_by(self, scale: algebra.Matrix, operand: algebra.Matrix, x: Activation) -> fx.Node:
        if self.of(scale) == (self.of(operand)[0], 1):
            return self._times(self(operand, x), scale)
        assert isinstance(x, Dense)
        return self(operand, Dense(self._times(x.node, scale)))

    def _times(self, node: fx.Node, entries: algebra.Matrix) -> fx.Node:
        value = self.value(entries)
        if value.meta["val"].dim() > 1:
            value = self.emit.call(aten.reshape.default, value, [-1])
        return self.emit.call(aten.mul.Tensor, self.cast(node, value.meta["val"].dtype), value)

    def _block_diag(self, blocks: algebra.Matrix, node: fx.Node) -> fx.Node:
        value = self.value(blocks)
        count, _, columns = self.of(blocks)
        apart = self.emit.call(aten.unflatten.int, self.cast(node, value.meta["val"].dtype), -1, [count, columns])
        mixed = self.emit.call(aten.einsum.default, "...nb,nab->...na", [apart, value])
        return self.emit.call(aten.flatten.using_ints, mixed, -2, -1)

    def _kron(self, left: algebra.Matrix, right: algebra.Matrix, node: fx.Node) -> fx.Node:
        first, second = self.value(left), self.value(right)
        b, d = self.of(left)[1], self.of(right)[1]
        apart = self.emit.call(aten.unflatten.int, self.cast(node, first.meta["val"].dtype), -1, [b, d])
        inner = self.emit.call(aten.linear.default, apart, second)
        outer = self.emit.call(aten.linear.default, self.emit.call(aten.transpose.int, inner, -1, -2), first)
        return self.emit.call(aten.flatten.using_ints, self.emit.call(aten.transpose.int, outer, -1, -2), -2, -1)

    def _cycle(self, operand: algebra.Matrix, size: int, node: fx.Node) -> fx.Node:
        period = self.of(operand)[1]
        missing = -size % period
        padded = self.emit.call(aten.constant_pad_nd.default, node, [0, missing]) if missing else node
        apart = self.emit.call(aten.unflatten.int, padded, -1, [-1, period])
        return self(operand, Dense(self.emit.call(aten.sum.dim_IntList, apart, [-2])))


def _chains(left: algebra.Matrix, x: Activation) -> bool:
    """Whether the left side of a product can meet what the right side makes of `x`."""
    return isinstance(x, Dense) or not _holds_weight(left)


def _is_narrow(right: algebra.Matrix) -> bool:
    """Whether the inner size of a product is an adapter's, and not one of the weight's own."""
    return not _holds_weight(right)


def _holds_weight(matrix: algebra.Matrix) -> bool:
    return any(isinstance(each, algebra.Weight) for each in algebra.walk(matrix))


def transposed(matrix: algebra.Matrix) -> algebra.Matrix | None:
    """The transposition pushed one step inwards, or None where that is no simpler."""
    match matrix:
        case algebra.Transposed(operand):
            return operand
        case algebra.Product(left, right):
            return algebra.Product(algebra.Transposed(right), algebra.Transposed(left))
        case algebra.Scaled(scalar, operand):
            return algebra.Scaled(scalar, algebra.Transposed(operand))
        case algebra.Function("diag" | "eye"):
            return matrix
        case algebra.Function("kron", (left, right)):
            return algebra.Function("kron", (algebra.Transposed(left), algebra.Transposed(right)))
        case _:
            return None


Primes = tuple[algebra.Matrix, algebra.Matrix | None]
"""W' and b'; None where the bias stays as it is."""


def compose(adapters: Sequence[Primes], has_bias: bool = True) -> Primes:
    """Several adapters at one site as one expression: each one's W and b are what the adapters before it made.

    Where the module has no bias, b is zero until an adapter brings one.
    """
    weight: algebra.Matrix = algebra.Weight()
    bias: algebra.Matrix | None = None
    for new_weight, new_bias in adapters:
        before = (weight, bias or algebra.Bias())
        weight = _substitute(new_weight, *before)
        if new_bias is not None:
            there = has_bias or bias is not None
            bias = _substitute(new_bias, *before) if there else algebra.without_bias(new_bias)
    return weight, bias


def deltas(matrix: algebra.Matrix, base: algebra.Matrix = WEIGHT) -> tuple[algebra.Matrix, ...] | None:
    """`W + D + E` -> (D, E); None for an expression that is not `base` plus something."""
    terms = _terms(matrix)
    if base not in terms:
        return None
    terms.remove(base)
    return tuple(terms)


def _terms(matrix: algebra.Matrix) -> list[algebra.Matrix]:
    if isinstance(matrix, algebra.Sum):
        return _terms(matrix.left) + _terms(matrix.right)
    return [matrix]


def _substitute(matrix: algebra.Matrix, weight: algebra.Matrix, bias: algebra.Matrix) -> algebra.Matrix:
    match matrix:
        case algebra.Weight():
            return weight
        case algebra.Bias():
            return bias
        case _:
            return algebra.rebuild(matrix, lambda operand: _substitute(operand, weight, bias))


def renamed(matrix: algebra.Matrix, prefix: str) -> algebra.Matrix:
    """The expression with every role and scalar prefixed, so that two adapters' names cannot meet."""
    match matrix:
        case algebra.Param(role):
            return algebra.Param(prefix + role)
        case algebra.Scaled(scalar, operand):
            return algebra.Scaled(prefix + scalar, renamed(operand, prefix))
        case _:
            return algebra.rebuild(matrix, lambda operand: renamed(operand, prefix))
