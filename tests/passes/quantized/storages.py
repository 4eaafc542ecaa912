"""A module of every quantization library for the tests: the same linear, stored in all the ways that are known."""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerTensor,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType

Store = Callable[[nn.Linear], nn.Module]


def four_bit(kind: str, double: bool = False, compute: torch.dtype | None = None) -> Store:
    """bitsandbytes' Linear4bit. Without its CPU kernel, which computes in bfloat16 whatever it was told."""

    def store(linear: nn.Linear) -> nn.Module:
        dtype = linear.weight.dtype
        made = bnb.nn.Linear4bit(*sizes(linear), compute or dtype, double, kind, device="meta")
        weight = linear.weight.detach().clone()
        made.weight = bnb.nn.Params4bit(weight, False, compress_statistics=double, quant_type=kind, module=made)
        made.weight = made.weight.to("cpu")
        made.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        made.support_avx512bf16_for_cpu = False
        return made

    return store


def eight_bit(threshold: float) -> Store:
    """bitsandbytes' Linear8bitLt."""

    def store(linear: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear8bitLt(*sizes(linear), has_fp16_weights=False, threshold=threshold, device="meta")
        weight = linear.weight.detach().clone()
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
        made.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return made

    return store


def torchao(config: Any) -> Store:
    """A plain linear with a tensor of torchao's."""

    def store(linear: nn.Linear) -> nn.Module:
        made = nn.Linear(*sizes(linear), dtype=linear.weight.dtype).requires_grad_(False)
        made.load_state_dict(linear.state_dict())
        quantize_(made, config)
        return made

    return store


def hqq(bits: int, **options: Any) -> Store:
    """HQQ's linear; its bias is no parameter."""

    def store(linear: nn.Linear) -> nn.Module:
        with torch.no_grad():
            copied = nn.Linear(*sizes(linear), dtype=linear.weight.dtype)
            copied.load_state_dict(linear.state_dict())
            settings = BaseQuantizeConfig(nbits=bits, group_size=32, **options)
            return HQQLinear(copied, settings, compute_dtype=linear.weight.dtype, device="cpu")

    return store


def sizes(linear: nn.Linear) -> tuple[int, int, bool]:
    """What a linear's class is called with."""
    return linear.in_features, linear.out_features, linear.bias is not None


INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
INT3 = IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(16), mapping_type=MappingType.ASYMMETRIC)

STORES: dict[str, Store] = {
    "nf4": four_bit("nf4"),
    "fp4": four_bit("fp4"),
    "nf4 double": four_bit("nf4", double=True),
    "nf4 in bfloat16": four_bit("nf4", compute=torch.bfloat16),
    "int8 with outliers": eight_bit(6.0),
    "int8": eight_bit(0.0),
    "torchao int8": torchao(Int8WeightOnlyConfig()),
    "torchao int8 in groups": torchao(Int8WeightOnlyConfig(granularity=PerGroup(32))),
    "torchao int8 as one": torchao(Int8WeightOnlyConfig(granularity=PerTensor())),
    "torchao int4": torchao(INT4),
    "torchao int3": torchao(INT3),
    "torchao float8": torchao(Float8WeightOnlyConfig()),
    "torchao float8 as one": torchao(Float8WeightOnlyConfig(granularity=PerTensor())),
    "hqq 8": hqq(8),
    "hqq 4": hqq(4),
    "hqq 4 by columns": hqq(4, axis=0),
    "hqq 4 as floats": hqq(4, view_as_float=True),
    "hqq 3": hqq(3),
    "hqq 2": hqq(2),
}
