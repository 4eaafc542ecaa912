"""Numbers that are drawn anew in every call while training: what adapters drop."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from peftc.grammar.algebra.algebra import Option
from peftc.passes.expression.scene import LoweringContext

aten = torch.ops.aten
T = TypeVar("T")


def coins(scene: LoweringContext[T], _: Sequence[T], options: Sequence[Option]) -> T:
    """Ones, of which while training each is zero with a probability: `[size]`."""
    size, p = options
    return _marks(scene, size, lambda drawn: scene.call(aten.ge.Scalar, drawn, p))


def thinned(scene: LoweringContext[T], _: Sequence[T], options: Sequence[Option]) -> T:
    """Ones, of which while training so many are zero: `[size]`."""
    size, zeros = options

    def kept(drawn: T) -> T:
        order = scene.call(aten.argsort.default, scene.call(aten.argsort.default, drawn))
        return scene.call(aten.ge.Scalar, order, zeros)

    return _marks(scene, size, kept)


def noisy(scene: LoweringContext[T], operands: Sequence[T], _: Sequence[Option]) -> T:
    """`x`, and while training `x + log(u) - log(1 - u)`, the logistic distribution's numbers, `u` even from 0 to 1.

    The sigmoid of it is a relaxed Bernoulli draw at temperature 1 (Maddison et al. 2017, arXiv:1611.00712), as
    `torch.distributions.RelaxedBernoulli` draws it.
    """
    (x,) = operands
    if not scene.training:
        return x
    least = torch.finfo(scene.kind(x)["dtype"]).eps
    drawn = scene.call(aten.clamp.default, scene.call(aten.rand_like.default, x), least, 1 - least)
    odds = scene.call(
        aten.sub.Tensor,
        scene.call(aten.log.default, drawn),
        scene.call(aten.log1p.default, scene.call(aten.neg.default, drawn)),
    )
    return scene.call(aten.add.Tensor, x, odds)


def _marks(scene: LoweringContext[T], size: Option, kept: Callable[[T], T]) -> T:
    """Ones, and while training whether numbers that are drawn evenly from 0 to 1 are kept."""
    kind = scene.kind(scene.example)
    if not scene.training:
        return for_all(scene, scene.call(aten.ones.default, [size], **kind))
    drawn = scene.call(aten.rand.default, [size], dtype=torch.float32, device=kind["device"])
    return for_all(scene, scene.call(aten.to.dtype, kept(drawn), kind["dtype"]))


def for_all(scene: LoweringContext[T], value: T) -> T:
    """The same for every expert of a stack."""
    return scene.call(aten.unsqueeze.default, value, 0) if scene.lead else value
