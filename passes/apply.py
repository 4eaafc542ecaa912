"""apply(E, x): how an expression for a weight meets an activation, as rewrite laws.

Each law is a case of `Apply.__call__`, its equation in front. Where no law pushes `x` through, the expression is
materialised: `apply(E, x) = linear(x, materialise(E))` always holds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from peftc.grammar import algebra
from peftc.passes.emit import Emit
from peftc.passes.materialise import materialise

aten = torch.ops.aten


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


@dataclass(frozen=True)
class Apply:
    """Lowers expressions at one site. `weight` emits the logical value of W, and is only called when it is needed."""

    emit: Emit
    params: Mapping[str, fx.Node]
    scalars: Mapping[str, fx.Node]
    weight: Callable[[], fx.Node]
    training: bool

    def __call__(self, matrix: algebra.Matrix, x: Activation) -> fx.Node:
        """The node of `matrix` applied to `x`, `[.., out]`."""
        match matrix, x:
            # apply(P + Q, x) = apply(P, x) + apply(Q, x)
            case algebra.Sum(left, right), _:
                return self.emit.call(aten.add.Tensor, self(left, x), self(right, x))
            # apply(s * (P @ Q), x) = apply(P, s * apply(Q, x)): the product's inner size is the small one
            case algebra.Scaled(scalar, algebra.Product(left, right)), _:
                return self(left, Dense(self._scale(self(right, x), scalar)))
            # apply(s * P, x) = s * apply(P, x)
            case algebra.Scaled(scalar, operand), _:
                return self._scale(self(operand, x), scalar)
            # apply(P @ Q, x) = apply(P, apply(Q, x))
            case algebra.Product(left, right), _:
                return self(left, Dense(self(right, x)))
            # apply(drop(P, p), x) = apply(P, dropout(x, p)); a row of the identity has nothing to drop
            case algebra.Dropped(operand, p), Dense(node) if self.training:
                return self(operand, Dense(self.emit.call(aten.dropout.default, node, p, True)))
            case algebra.Dropped(operand, _), _:
                return self(operand, x)
            # apply(A, one_hot(i)) = A[:, i]
            case algebra.Param(role), OneHot(ids, options):
                columns = self.emit.call(aten.transpose.int, self.params[role], -1, -2)
                return self.emit.call(aten.embedding.default, columns, ids, *options)
            # apply(A, x) = linear(x, A)
            case algebra.Param(role), Dense(node):
                return self._linear(node, self.params[role])
            # apply(E, x) = linear(x, materialise(E))
            case _, Dense(node):
                return self._linear(node, self.value(matrix))
            case _, OneHot(ids, options):
                columns = self.emit.call(aten.transpose.int, self.value(matrix), -1, -2)
                return self.emit.call(aten.embedding.default, columns, ids, *options)

    def value(self, matrix: algebra.Matrix) -> fx.Node:
        """The logical value of an expression."""
        needs = any(isinstance(each, algebra.Weight) for each in algebra.walk(matrix))
        return materialise(matrix, self.emit, self.weight() if needs else None, self.params, self.scalars)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The node in this type, itself if it already is."""
        return node if node.meta["val"].dtype == dtype else self.emit.call(aten.to.dtype, node, dtype)

    def _linear(self, x: fx.Node, weight: fx.Node) -> fx.Node:
        # As PEFT does: a float32 adapter on a bfloat16 base computes its part in float32.
        return self.emit.call(aten.linear.default, self.cast(x, weight.meta["val"].dtype), weight)

    def _scale(self, node: fx.Node, scalar: str) -> fx.Node:
        return self.emit.call(aten.mul.Tensor, node, self.scalars[scalar])


def compose(matrices: tuple[algebra.Matrix, ...]) -> algebra.Matrix:
    """Several adapters at one site as one expression: each one's W is what the adapters before it made."""
    result: algebra.Matrix = algebra.Weight()
    for matrix in matrices:
        result = _substitute(matrix, result)
    return result


def deltas(matrix: algebra.Matrix) -> tuple[algebra.Matrix, ...] | None:
    """`W + D + E` -> (D, E); None for an expression that is not W plus something."""
    terms = _terms(matrix)
    if algebra.Weight() not in terms:
        return None
    terms.remove(algebra.Weight())
    return tuple(terms)


def _terms(matrix: algebra.Matrix) -> list[algebra.Matrix]:
    if isinstance(matrix, algebra.Sum):
        return _terms(matrix.left) + _terms(matrix.right)
    return [matrix]


def _substitute(matrix: algebra.Matrix, weight: algebra.Matrix) -> algebra.Matrix:
    if isinstance(matrix, algebra.Weight):
        return weight
    return algebra.rebuild(matrix, lambda operand: _substitute(operand, weight))


def renamed(matrix: algebra.Matrix, prefix: str) -> algebra.Matrix:
    """The expression with every role and scalar prefixed, so that two adapters' names cannot meet."""
    match matrix:
        case algebra.Param(role):
            return algebra.Param(prefix + role)
        case algebra.Scaled(scalar, operand):
            return algebra.Scaled(prefix + scalar, renamed(operand, prefix))
        case _:
            return algebra.rebuild(matrix, lambda operand: renamed(operand, prefix))
