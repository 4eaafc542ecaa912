"""HQQ's linears: half-quadratic quantization in 1 to 8 bits (https://mobiusml.github.io/hqq_blog/)."""

import copy
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from peftc.passes.quantized.schemes.packing import Option, Packing, is_a, shallow, shared_bias


class HalfQuadratic:
    """`HQQLinear`: numbers of a few bits, packed into wider ones, with a scale and a zero point for every group.

    Parts are the numbers, the scales and the zero points. The linear is that of HQQ's PyTorch backend, on every device:
    the dense weight for the time of one product.
    """

    name = "hqq"
    backend = "hqq"

    def packing(self, module: nn.Module) -> Packing | None:
        """How an HQQLinear stores its weight; None before it is quantized, or where its scales are quantized too."""
        meta: Any = getattr(module, "meta", None)
        if not is_a(module, "hqq.core.quantize", "HQQLinear") or not isinstance(meta, dict):
            return None
        if any(not isinstance(meta.get(name), torch.Tensor) for name in ("scale", "zero")):
            return None
        out_features, in_features = (int(size) for size in meta["shape"])
        bits: Any = meta["nbits"]
        options: tuple[tuple[str, Option], ...] = (
            ("bits", bits),
            ("group", int(meta["group_size"] or 0)),
            ("axis", int(meta["axis"])),
            ("packing", meta["packing"] or ""),
            ("as_float", bool(meta["view_as_float"])),
            ("numbers", str(meta["unpack_view_dtype"]).removeprefix("torch.")),
        )
        kind = meta.get("compute_dtype", module.compute_dtype)
        return Packing(self.name, f"hqq{bits}", out_features, in_features, kind, None, options)

    def parts(self, module: nn.Module) -> tuple[torch.Tensor, ...]:
        """The numbers, the scales and the zero points."""
        held: Any = module
        return held.W_q.detach(), held.meta["scale"].detach(), held.meta["zero"].detach()

    def linear(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        parts: Sequence[torch.Tensor],
        packing: Packing,
        training: bool,
    ) -> torch.Tensor:
        """As `HQQLinear.forward_pytorch`, in the type of `x`."""
        made = torch.matmul(x, self.unpack(parts, packing).to(x.dtype).t())
        return made if bias is None else made.add_(bias.to(x.dtype))

    def unpack(self, parts: Sequence[torch.Tensor], packing: Packing) -> torch.Tensor:
        """As `HQQLinear.dequantize`."""
        numbers, scale, zero = parts
        settings = packing.settings
        quantizer: Any = import_module("hqq.core.quantize").Quantizer
        meta = {
            "nbits": settings["bits"],
            "group_size": settings["group"],
            "axis": settings["axis"],
            "packing": settings["packing"],
            "view_as_float": settings["as_float"],
            "unpack_view_dtype": getattr(torch, str(settings["numbers"])),
            "shape": (packing.out_features, packing.in_features),
            "compute_dtype": packing.dtype,
            "scale": scale,
            "zero": zero,
        }
        return quantizer.dequantize(numbers, meta)

    def share(self, module: nn.Module) -> nn.Module:
        """Another HQQLinear over the same numbers and scales, its bias a parameter. Its zero points may be copied."""
        made: Any = shallow(module)
        held: Any = module
        made.__dict__.pop("bias", None)
        made._parameters["W_q"] = nn.Parameter(_normal(held.W_q), requires_grad=False)
        made.meta |= {name: _normal(held.meta[name]) for name in ("scale", "zero")}
        made._parameters["bias"] = shared_bias(module)
        # The layer it was made from, if HQQ was told to keep it.
        made._modules.pop("linear_layer", None)
        made.linear_layer = None
        return made

    def pack(self, weight: torch.Tensor, like: nn.Module) -> nn.Module:
        """Another HQQLinear with these weights, quantized with the same settings."""
        library: Any = import_module("hqq.core.quantize")
        made: Any = self.share(like)
        out_features, in_features = weight.shape
        dense = nn.Linear(in_features, out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(weight.detach(), requires_grad=False)
        settings = {**copy.deepcopy(made.quant_config or _settings(made.meta, library)), "offload_meta": False}
        fresh = library.HQQLinear(dense, settings, compute_dtype=made.compute_dtype, device=str(made.W_q.device))
        made._parameters["W_q"], made.meta = fresh.W_q, fresh.meta
        return self.share(made)


def _normal(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, unless HQQ made it in inference mode: then torch.compile refuses it, and it is copied."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _settings(meta: Any, library: Any) -> dict[str, Any]:
    """How a layer that was loaded without its settings was quantized, as far as that is to be seen."""
    names = ("nbits", "group_size", "axis", "view_as_float")
    return library.hqq_base_quant_config(**{name: meta[name] for name in names})
