"""Which type numbers are computed in: two types that meet, and what torch has not in half precision."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from peftc.grammar.algebra.algebra import Option
from peftc.passes.expression.scene import LoweringContext, Ops

aten = torch.ops.aten
T = TypeVar("T")

Lowering = Callable[[LoweringContext[Any], Sequence[Any], Sequence[Option]], Any]


def together(ops: Ops[T], left: T, right: T) -> tuple[T, T]:
    """Two values for an operator that takes one type, both in the wider one: bfloat16 and float16 meet in float32."""
    kinds = [ops.tensor(each).dtype for each in (left, right)]
    wider = torch.promote_types(*kinds)
    first, second = (
        each if kind == wider else ops.call(aten.to.dtype, each, wider)
        for each, kind in zip((left, right), kinds, strict=True)
    )
    return first, second


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type, float32 for what has fewer digits."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def in_float32(lowering: Lowering) -> Lowering:
    """Of halves in float32, the result rounded once: torch factors, solves and transforms none of them, or wrongly."""

    def lower(scene: LoweringContext[Any], operands: Sequence[Any], options: Sequence[Option]) -> Any:
        kinds = [scene.kind(each)["dtype"] for each in operands]
        wide = [
            each if at_least_float32(kind) == kind else scene.call(aten.to.dtype, each, at_least_float32(kind))
            for each, kind in zip(operands, kinds, strict=True)
        ]
        made = lowering(scene, wide, options)
        own = functools.reduce(torch.promote_types, kinds)
        return made if scene.kind(made)["dtype"] == own else scene.call(aten.to.dtype, made, own)

    return lower


def clamp(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    """Between bounds; one that is beyond the type's range bounds nothing."""
    (x,), bounds = operands, [each for each in options if isinstance(each, int | float)]
    kind = scene.kind(x)["dtype"]
    if kind.is_floating_point:
        largest = torch.finfo(kind).max
        bounds = [each if abs(each) <= largest else math.copysign(math.inf, each) for each in bounds]
    return scene.call(aten.clamp.default, x, *bounds)
