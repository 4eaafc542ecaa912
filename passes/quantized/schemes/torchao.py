"""torchao's weight-only tensors: int8, int1 to int8 in groups, and float8."""

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from peftc.passes.quantized.schemes.packing import Option, Packing, shallow, shared_bias

KINDS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
ON_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "act_pre_scale")


class TorchAo:
    """A plain `Linear` whose weight is one of torchao's tensors, made of others: numbers, scales and zero points.

    Parts are those that are there, in torchao's order. What is computed, torchao computes, from a tensor put together
    again. Tensors that round the activation too are not of this scheme: torchao gives them no gradient.
    """

    name = "torchao"
    backend = "torchao"

    def packing(self, module: nn.Module) -> Packing | None:
        """How a linear's torchao tensor is stored; None for other modules and other tensors."""
        weight: Any = module._parameters.get("weight")
        if not isinstance(module, nn.Linear) or not is_torchao(weight) or refusal(weight):
            return None
        kind = type(weight).__name__
        stored = weight.__tensor_flatten__()[0]
        options: list[tuple[str, Option]] = [("tensor", kind), ("parts", " ".join(stored))]
        options.append(("block", " ".join(map(str, weight.block_size or ()))))
        bits = weight.target_dtype if kind == "IntxUnpackedToInt8Tensor" else weight.qdata.dtype
        label = str(bits).removeprefix("torch.")
        options.append(("numbers", label))
        out_features, in_features = (int(size) for size in weight.shape)
        return Packing(self.name, label, out_features, in_features, weight.dtype, None, tuple(options))

    def parts(self, module: nn.Module) -> tuple[torch.Tensor, ...]:
        """The tensors inside the weight."""
        weight: Any = module.weight
        return tuple(getattr(weight, name).detach() for name in weight.__tensor_flatten__()[0])

    def linear(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        parts: Sequence[torch.Tensor],
        packing: Packing,
        training: bool,
    ) -> torch.Tensor:
        """As torchao's own linear; as the dense one where the types differ, which some of its tensors refuse."""
        own = None if bias is None else bias.to(x.dtype)
        weight = _tensor(parts, packing)
        if x.dtype != packing.dtype and packing.settings["tensor"] != "Int8Tensor":
            weight = weight.dequantize().to(x.dtype)
        return nn.functional.linear(x, weight, own)

    def unpack(self, parts: Sequence[torch.Tensor], packing: Packing) -> torch.Tensor:
        """As the tensor's `dequantize`."""
        return _tensor(parts, packing).dequantize()

    def share(self, module: nn.Module) -> nn.Module:
        """Another linear over the same inner tensors."""
        made = shallow(module)
        made.__dict__.pop("extra_repr", None)  # torchao's, bound to the other module, which copies would then copy
        weight: Any = module.weight
        made._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=False)
        made._parameters["bias"] = shared_bias(module)
        return made

    def pack(self, weight: torch.Tensor, like: nn.Module) -> nn.Module:
        """Another linear with these weights, in numbers and blocks of the same kind.

        Every block of whole numbers takes a new scale, or keeps its old one where that loses no more: what did not
        change is stored as it was. (torchao chooses a scale that it would not choose again from its own result.)
        """
        made = self.share(like)
        old: Any = made.weight
        value = weight.detach().to(old.dtype).contiguous()
        names, attributes = old.__tensor_flatten__()
        found = _packed(value, old)
        parts = {name: found[name].to(getattr(old, name).dtype) for name in names}
        fresh = type(old).__tensor_unflatten__(parts, attributes, value.shape, value.stride())
        made._parameters["weight"] = nn.Parameter(fresh, requires_grad=False)
        return made


def is_torchao(tensor: object) -> bool:
    """Whether a tensor is one of torchao's own."""
    return any(each.__module__.partition(".")[0] == "torchao" for each in type(tensor).__mro__)


def refusal(weight: Any) -> str:
    """Why one of torchao's tensors cannot be used here, if so."""
    if type(weight).__name__ not in KINDS:
        return "which gives no dense weight and no gradient here"
    if any(getattr(weight, name, None) is not None for name in ON_ACTIVATIONS):
        return "which changes the activation too, without a gradient"
    return "" if weight.dim() == 2 else "which is no matrix"


def _tensor(parts: Sequence[torch.Tensor], packing: Packing) -> Any:
    settings = packing.settings
    kind: Any = getattr(import_module("torchao.quantization"), str(settings["tensor"]))
    block = [int(size) for size in str(settings["block"]).split()]
    more: dict[str, Any] = {"block_size": block}
    if settings["tensor"] == "IntxUnpackedToInt8Tensor":
        target = getattr(torch, str(settings["numbers"]))
        more = {"block_size": tuple(block), "target_dtype": target, "activation_quantization": None}
    return kind(**dict(zip(str(settings["parts"]).split(), parts, strict=True)), dtype=packing.dtype, **more)


def _packed(value: torch.Tensor, old: Any) -> dict[str, torch.Tensor]:
    """The inner tensors for a new value, by name."""
    kind = type(old)
    if kind.__name__ == "Float8Tensor":
        return _inner(kind.from_hp(value, old.qdata.dtype, _granularity(old)), old)
    if kind.__name__ == "Int8Tensor":
        how = {"granularity": _granularity(old), "reduce_range": old.reduce_range}
        fresh = kind.from_hp(value, **how)
        kept = kind.from_hp(value, scale=old.scale, zero_point=old.zero_point, **how)
    else:
        mappings: Any = import_module("torchao.quantization.quant_primitives").MappingType
        mapping = mappings.ASYMMETRIC if old.zero_point.any() else mappings.SYMMETRIC
        fresh = kind.from_hp(value, old.block_size, old.target_dtype, mapping_type=mapping)
        same = {"custom_scale": old.scale, "custom_zero_point": old.zero_point}
        how = {"mapping_type": mapping, "intx_choose_qparams_algorithm": None}
        kept = kind.from_hp(value, old.block_size, old.target_dtype, **how, **same)
    block = list(old.block_size)
    stays = _loss(kept, value, block) <= _loss(fresh, value, block)
    wide = stays.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    left, right = _inner(kept, old), _inner(fresh, old)
    return {name: torch.where(wide if name == "qdata" else stays, left[name], right[name]) for name in left}


def _inner(tensor: Any, like: Any) -> dict[str, torch.Tensor]:
    return {name: getattr(tensor, name) for name in like.__tensor_flatten__()[0]}


def _loss(tensor: Any, value: torch.Tensor, block: Sequence[int]) -> torch.Tensor:
    """The squared error of every block, `[out / rows, in / columns]`."""
    rows, columns = (size // part for size, part in zip(value.shape, block, strict=True))
    error = (tensor.dequantize().float() - value.float()).square()
    return error.view(rows, block[0], columns, block[1]).sum((1, 3))


def _granularity(old: Any) -> Any:
    library: Any = import_module("torchao.quantization.granularity")
    rows, columns = old.block_size
    if rows * columns == math.prod(old.shape):
        return library.PerTensor()
    if columns == old.shape[1] and rows == 1:
        return library.PerRow()
    return library.PerGroup(columns) if rows == 1 else library.PerBlock((rows, columns))
