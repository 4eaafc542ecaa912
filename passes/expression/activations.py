"""Activations by name, as torch computes them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from peftc.grammar.algebra.algebra import Option
from peftc.passes.expression.scene import LoweringContext

aten = torch.ops.aten
T = TypeVar("T")


def _quick_gelu(scene: LoweringContext[T], x: T) -> T:
    gate = scene.call(aten.sigmoid.default, scene.call(aten.mul.Tensor, x, 1.702))
    return scene.call(aten.mul.Tensor, x, gate)


# Those that are an operator and its arguments; the others are a few lines.
_ACTIVATIONS: Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
    "gelu": (aten.gelu.default, {}),
    "gelu_new": (aten.gelu.default, {"approximate": "tanh"}),
    "leaky_relu": (aten.leaky_relu.default, {}),
    "mish": (aten.mish.default, {}),
    "relu": (aten.relu.default, {}),
    "relu6": (aten.hardtanh.default, {"min_val": 0.0, "max_val": 6.0}),
    "sigmoid": (aten.sigmoid.default, {}),
    "silu": (aten.silu.default, {}),
    "softplus": (aten.softplus.default, {}),
    "swish": (aten.silu.default, {}),
    "tanh": (aten.tanh.default, {}),
}


def activation(scene: LoweringContext[T], operands: Sequence[T], options: Sequence[Option]) -> T:
    """An activation by the name that transformers has for it."""
    (x,), (name,) = operands, options
    match name:
        case "linear":
            return x
        case "quick_gelu":
            return _quick_gelu(scene, x)
        case _:
            op, arguments = _ACTIVATIONS[str(name)]
            return scene.call(op, x, **arguments)
