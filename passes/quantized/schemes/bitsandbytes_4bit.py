"""bitsandbytes' 4-bit linears, nf4 and fp4 (https://arxiv.org/abs/2305.14314), with and without double quantization."""

import copy
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from peftc.passes.quantized.schemes.packing import Packing, is_a, operators, shallow, shared_bias

NESTED_BLOCK = 256  # the one that bitsandbytes' own matmul knows


class FourBit:
    """`Linear4bit`: codes of 4 bits, two to a byte, with a scale for every block of them.

    Parts are the codes and the scales; double quantization has the scales in 8 bits, with their own scales, code and
    offset. The operators are bitsandbytes' own, so what is computed is what it computes from weights as they are
    loaded. (Its modules, on a CPU with AVX-512 BF16, repack themselves when first called in evaluation mode, and
    compute in bfloat16 whatever the compute type says.)
    """

    name = "bitsandbytes-4bit"
    backend = "bitsandbytes"

    def packing(self, module: nn.Module) -> Packing | None:
        """How a Linear4bit stores its weight; None before it is quantized."""
        if not is_a(module, "bitsandbytes.nn.modules", "Linear4bit"):
            return None
        state: Any = getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)
        if state is None:
            return None
        dtype = state.original_dtype if getattr(state, "packing_format_for_cpu", False) else state.dtype
        compute = getattr(module, "compute_dtype", None)
        out_features, in_features = (int(each) for each in state.shape)
        options = (("block", int(state.blocksize)), ("nested", _is_nested(state)))
        return Packing(self.name, str(state.quant_type), out_features, in_features, dtype, compute, options)

    def parts(self, module: nn.Module) -> tuple[torch.Tensor, ...]:
        """Codes and scales; or codes, 8-bit scales, their scales, their code, their offset."""
        weight: Any = module.weight
        state: Any = weight.quant_state if weight.quant_state is not None else module.quant_state
        codes = weight.detach().view(-1, 1).as_subclass(torch.Tensor)
        if not state.nested:
            return codes, state.absmax
        return codes, state.absmax, state.state2.absmax, state.state2.code, state.offset

    def linear(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        parts: Sequence[torch.Tensor],
        packing: Packing,
        training: bool,
    ) -> torch.Tensor:
        """As `bitsandbytes.matmul_4bit`, in the compute type."""
        kind = packing.compute or x.dtype
        codes, scales, *nested = parts
        arguments: dict[str, torch.Tensor | None] = {"bias": None if bias is None else bias.to(kind)}
        if nested:
            arguments |= {"absmax_8bit": scales, "absmax_code": nested[1], "absmax_offset": nested[2]}
            scales = nested[0]
        shape = [packing.out_features, packing.in_features]
        gemm: Any = operators(self.backend).gemm_4bit.default
        block = packing.number("block")
        return gemm(x.to(kind), codes, shape, scales, block, packing.label, **arguments).to(x.dtype)

    def unpack(self, parts: Sequence[torch.Tensor], packing: Packing) -> torch.Tensor:
        """As `bitsandbytes.functional.dequantize_4bit`."""
        codes, scales, *nested = parts
        library: Any = operators(self.backend)
        if nested:
            own, code, offset = nested
            unpacked = library.dequantize_blockwise.default(scales, own, code, NESTED_BLOCK, torch.float32)
            scales = unpacked + offset
        shape = [packing.out_features, packing.in_features]
        dequantize = library.dequantize_4bit.default
        return dequantize(codes, scales, packing.number("block"), packing.label, shape, packing.dtype)

    def share(self, module: nn.Module) -> nn.Module:
        """Another Linear4bit over the same codes, that never repacks them; turned back where that has happened."""
        weight: Any = module.weight
        state: Any = copy.copy(weight.quant_state if weight.quant_state is not None else module.quant_state)
        if state.nested:
            state.state2 = copy.copy(state.state2)
        made: Any = shallow(module)
        own: Any = copy.copy(weight)
        if getattr(state, "packing_format_for_cpu", False):
            own.data = _turned_back(weight.data, state)
        own.quant_state = made.quant_state = state
        own.module = made
        made.support_avx512bf16_for_cpu = False
        made._parameters["weight"] = own
        made._parameters["bias"] = shared_bias(module)
        return made

    def pack(self, weight: torch.Tensor, like: nn.Module) -> nn.Module:
        """Another Linear4bit with these weights, in blocks and code of the same kind."""
        made: Any = self.share(like)
        old: Any = made.weight
        kind = old.quant_state.dtype
        fresh = type(old)(
            weight.detach().to(kind).contiguous(),
            requires_grad=False,
            blocksize=old.quant_state.blocksize,
            compress_statistics=old.quant_state.nested,
            quant_type=old.quant_state.quant_type,
            quant_storage=old.quant_storage,
            module=made,
        )
        made._parameters["weight"] = fresh.to(weight.device)
        return made


def _is_nested(state: Any) -> bool:
    return bool(state.nested) and not getattr(state, "packing_format_for_cpu", False)


def _turned_back(codes: torch.Tensor, state: Any) -> torch.Tensor:
    """The codes of a repacked module in their first order; its scales, which repacking rounded, as they are now.

    bitsandbytes' own way back leaves the scales transposed, or rounds them a second time.
    """
    functional: Any = import_module("bitsandbytes.functional")
    scales = state.absmax.T.reshape(-1).to(torch.float32)
    state.original_nested = False
    turned, _ = functional._convert_weight_packed_for_cpu_inverse(codes, state)
    state.absmax, state.nested, state.state2, state.offset = scales, False, None, None
    return turned
