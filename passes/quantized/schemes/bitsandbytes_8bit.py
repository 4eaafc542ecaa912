"""bitsandbytes' 8-bit linears: LLM.int8() (https://arxiv.org/abs/2208.07339)."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftc.passes.quantized.schemes.packing import Packing, is_a, operators, shallow, shared_bias

RANGE = 127.0


class EightBit:
    """`Linear8bitLt`: whole numbers from -127 to 127, with a scale for every row of the weight.

    Parts are the numbers `[out, in]` (int8) and the scales `[out]` (float32). The activation is rounded to 8 bits too,
    but for columns with an outlier beyond the threshold; in training on the CPU it is not, as in bitsandbytes.
    """

    name = "bitsandbytes-8bit"
    backend = "bitsandbytes"

    def packing(self, module: nn.Module) -> Packing | None:
        """How a Linear8bitLt stores its weight; None for one that keeps float16 weights."""
        if not is_a(module, "bitsandbytes.nn.modules", "Linear8bitLt") or module.weight.dtype != torch.int8:
            return None
        state: Any = module.state
        weight: Any = module.weight
        out_features, in_features = weight.shape
        options = (("threshold", float(state.threshold)),)
        return Packing(self.name, "int8", int(out_features), int(in_features), torch.float32, None, options)

    def parts(self, module: nn.Module) -> tuple[torch.Tensor, ...]:
        """The numbers and the scales, wherever the module keeps them at the moment."""
        weight: Any = module.weight
        state: Any = module.state
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else state.SCB
        numbers = state.CB if state.CB is not None else weight
        return numbers.detach().as_subclass(torch.Tensor), scales.detach()

    def linear(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        parts: Sequence[torch.Tensor],
        packing: Packing,
        training: bool,
    ) -> torch.Tensor:
        """As `bitsandbytes.matmul`."""
        numbers, scales = parts
        own = None if bias is None else bias.to(x.dtype)
        if training and x.device.type in ("cpu", "xpu"):
            return nn.functional.linear(x, _unpacked(numbers, scales, x.dtype), own)
        if math.prod(x.shape) == 0:
            return x.new_empty((*x.shape[:-1], packing.out_features))
        library: Any = operators(self.backend)
        threshold = float(packing.settings["threshold"])
        rows = x.reshape(-1, x.shape[-1])
        rounded, steps, outliers = library.int8_vectorwise_quant.default(rows.to(torch.float16), threshold)
        if threshold > 0.0:
            mixed = library.int8_mixed_scaled_mm.default
            made, _ = mixed(rows, rounded, numbers, steps, scales, outliers, own)
        else:
            made = library.int8_scaled_mm.default(rounded, numbers, steps, scales, bias=own, dtype=x.dtype)
        return made.reshape(*x.shape[:-1], packing.out_features)

    def unpack(self, parts: Sequence[torch.Tensor], packing: Packing) -> torch.Tensor:
        """Numbers times scales over 127."""
        numbers, scales = parts
        return _unpacked(numbers, scales, packing.dtype)

    def share(self, module: nn.Module) -> nn.Module:
        """Another Linear8bitLt over the same numbers."""
        made: Any = shallow(module)
        numbers, scales = self.parts(module)
        made.state = copy.copy(module.state)
        made.state.CB = made.state.SCB = None
        made._parameters["weight"] = _stored(module, numbers, scales)
        made._parameters["bias"] = shared_bias(module)
        return made

    def pack(self, weight: torch.Tensor, like: nn.Module) -> nn.Module:
        """Another Linear8bitLt with these weights."""
        made = self.share(like)
        quantize: Any = operators(self.backend).int8_vectorwise_quant.default
        numbers, scales, _ = quantize(weight.detach().to(torch.float16).contiguous(), 0.0)
        made._parameters["weight"] = _stored(like, numbers, scales)
        return made


def _stored(module: nn.Module, numbers: torch.Tensor, scales: torch.Tensor) -> nn.Parameter:
    kind: Any = type(module.weight)
    return kind(numbers, requires_grad=False, has_fp16_weights=False, CB=numbers, SCB=scales)


def _unpacked(numbers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return numbers.to(dtype, copy=True).mul_(scales.unsqueeze(1).mul(1.0 / RANGE))
