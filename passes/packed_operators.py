"""The operators that graphs call where a weight is stored packed.

`peftc::quantized_linear` is what a trace holds in place of such a module; `peftc::packed_linear` and `peftc::unpack`
are what runs. The gradient of a packed linear keeps the stored tensors and unpacks them again: no dense weight is ever
saved for the backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftc.passes.packing import from_text
from peftc.passes.schemes.known import scheme_of, unpack

LIBRARY: Any = torch.library.Library("peftc", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define("quantized_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
LIBRARY.define("packed_linear(Tensor x, Tensor? bias, Tensor[] parts, str packing, bool training) -> Tensor")
LIBRARY.define("unpack(Tensor[] parts, str packing) -> Tensor")


def quantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a module with a packed weight gives of `x`: a linear in the type of `x`, whatever that of the weight."""
    own = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, weight.to(x.dtype), own)


def packed_linear(x: Tensor, bias: Tensor | None, parts: Sequence[Tensor], packing: str, training: bool) -> Tensor:
    """The packed linear, with gradients: what graphs that run as they are call."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _PackedLinear.apply(x, bias, packing, training, *parts)  # type: ignore[no-untyped-call]
    return _forward(x, bias, parts, packing, training)


def unpacked(parts: Sequence[Tensor], packing: str) -> Tensor:
    """The dense weight, `[out, in]`."""
    return unpack(parts, from_text(packing))


def _forward(x: Tensor, bias: Tensor | None, parts: Sequence[Tensor], packing: str, training: bool) -> Tensor:
    known = from_text(packing)
    made = scheme_of(known).linear(x, bias, parts, known, training)
    # Adapters add themselves into the result, which autograd forbids where an operator gives a view of its own making.
    return torch.ops.aten._unsafe_view.default(made, made.shape) if made._is_view() else made


def _fake_linear(x: Tensor, bias: Tensor | None, parts: Sequence[Tensor], packing: str, training: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], from_text(packing).out_features))


def _fake_quantized(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_unpack(parts: Sequence[Tensor], packing: str) -> Tensor:
    known = from_text(packing)
    return parts[0].new_empty((known.out_features, known.in_features), dtype=known.dtype)


def _input_gradient(gradient: Tensor, weight: Tensor, packing: str) -> Tensor:
    kind = from_text(packing).compute or gradient.dtype
    return torch.matmul(gradient.to(kind), weight.to(kind)).to(gradient.dtype)


def _bias_gradient(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.reshape(-1, gradient.shape[-1]).sum(0).to(dtype)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packing: str, training: bool, *parts: Tensor) -> Tensor:
        ctx.packing = packing
        ctx.bias = None if bias is None else bias.dtype
        # Not through save_for_backward, which would hold on to tensors that autograd counts versions of: these are
        # frozen, and inference tensors have none.
        ctx.parts = parts
        return _forward(x, bias, parts, packing, training)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rest = (None,) * (2 + len(ctx.parts))
        bias = _bias_gradient(gradient, ctx.bias) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, bias, *rest
        return _input_gradient(gradient, unpacked(ctx.parts, ctx.packing), ctx.packing), bias, *rest


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, parts, packing, _ = inputs
    ctx.parts = parts  # as above
    ctx.packing = packing
    ctx.bias = None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    bias = _bias_gradient(gradient, ctx.bias) if ctx.needs_input_grad[1] else None
    x = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.peftc.unpack(list(ctx.parts), ctx.packing)
        x = _input_gradient(gradient, weight, ctx.packing)
    return x, bias, [None] * len(ctx.parts), None, None


LIBRARY.impl("quantized_linear", quantized_linear, "CompositeExplicitAutograd")
LIBRARY.impl("packed_linear", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("unpack", unpacked, "CompositeExplicitAutograd")
torch.library.register_fake("peftc::quantized_linear", _fake_quantized, lib=LIBRARY)
torch.library.register_fake("peftc::packed_linear", _fake_linear, lib=LIBRARY)
torch.library.register_fake("peftc::unpack", _fake_unpack, lib=LIBRARY)
torch.library.register_autograd("peftc::packed_linear", _backward, setup_context=_keep, lib=LIBRARY)

QUANTIZED_LINEAR = torch.ops.peftc.quantized_linear.default
PACKED_LINEAR = torch.ops.peftc.packed_linear.default
UNPACK = torch.ops.peftc.unpack.default
