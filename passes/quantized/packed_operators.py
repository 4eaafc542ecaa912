"""The operators that graphs call where a weight is stored packed.

`peftc::quantized_linear` is what a trace holds in place of such a module; `peftc::packed_linear` and `peftc::unpack`
are what runs. The gradient of a packed linear keeps the stored tensors and unpacks them again: no dense weight is ever
saved for the backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftc.passes.quantized.schemes.known import scheme_of
from peftc.passes.quantized.schemes.packing import from_text

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
    known = from_text(packing)
    return scheme_of(known).unpack(parts, known)


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


def _keep(ctx: Any, bias: Tensor | None, parts: Sequence[Tensor], packing: str) -> None:
    # Not through save_for_backward, which would hold on to tensors that autograd counts versions of: these are frozen,
    # and inference tensors have none.
    ctx.parts = parts
    ctx.packing = packing
    ctx.bias = None if bias is None else bias.dtype


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of the activation, over the weight unpacked again, and of the bias."""
    x = bias = None
    if ctx.needs_input_grad[0]:
        kind = from_text(ctx.packing).compute or gradient.dtype
        weight = torch.ops.peftc.unpack(list(ctx.parts), ctx.packing)
        x = torch.matmul(gradient.to(kind), weight.to(kind)).to(gradient.dtype)
    if ctx.needs_input_grad[1]:
        bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias)
    return x, bias


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packing: str, training: bool, *parts: Tensor) -> Tensor:
        _keep(ctx, bias, parts, packing)
        return _forward(x, bias, parts, packing, training)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, gradient), None, None, *(None for _ in ctx.parts)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, parts, packing, _ = inputs
    _keep(ctx, bias, parts, packing)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return *_gradients(ctx, gradient), [None] * len(ctx.parts), None, None


LIBRARY.impl("quantized_linear", quantized_linear, "CompositeExplicitAutograd")
LIBRARY.impl("packed_linear", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("unpack", unpacked, "CompositeExplicitAutograd")
torch.library.register_fake("peftc::quantized_linear", _fake_quantized, lib=LIBRARY)
torch.library.register_fake("peftc::packed_linear", _fake_linear, lib=LIBRARY)
torch.library.register_fake("peftc::unpack", _fake_unpack, lib=LIBRARY)
torch.library.register_autograd("peftc::packed_linear", _backward, setup_context=_setup, lib=LIBRARY)

QUANTIZED_LINEAR = torch.ops.peftc.quantized_linear.default
PACKED_LINEAR = torch.ops.peftc.packed_linear.default
UNPACK = torch.ops.peftc.unpack.default
