"""What becomes of weights that are stored packed when adapters are merged into them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from peftc.grammar.algebra import algebra
from peftc.grammar.diagnostics import UsageError, did_you_mean, fail
from peftc.passes.foreign import transformers as contract
from peftc.passes.plan.site import Site
from peftc.passes.quantized.schemes.known import Packed, packed, packed_modules
from peftc.runtime.adapters.bank import AdapterParameters

Quantized = Literal["requantize", "dequantize"]
"""The merged weights are packed again, as they were; or every packed weight of the model becomes dense."""

REQUANTIZE, DEQUANTIZE = get_args(Quantized)


def check_packed(active: Sequence[tuple[AdapterParameters, float]], quantized: str | None) -> None:
    """Raise UsageError unless it is said what becomes of the packed weights that these adapters adapt."""
    if quantized is not None and quantized not in get_args(Quantized):
        help = did_you_mean(str(quantized), get_args(Quantized)) or f"it is {REQUANTIZE!r} or {DEQUANTIZE!r}"
        fail(UsageError, "E523", f"quantized weights cannot be treated by {quantized!r}", help=help)
    weights = [at for adapter, _ in active for at in adapter.plan.sites if at.bound.weight != algebra.Weight()]
    sites = {at.site.name: at.site.packing for at in weights if at.site.packing is not None}
    kinds = sorted({each.label for each in sites.values()})
    if quantized is not None or not kinds:
        return
    count = len(sites)
    what = "a weight that is" if count == 1 else f"{count} weights that are"
    fail(
        UsageError,
        "E523",
        f"merging would change {what} quantized ({', '.join(kinds)})",
        help=f"quantized={REQUANTIZE!r} rounds the merged weights again (merge_drift says what that costs), "
        f"quantized={DEQUANTIZE!r} gives a dense model",
    )


def stored(model: nn.Module, site: Site, merged: Mapping[str, torch.Tensor], quantized: Quantized | None) -> nn.Module:
    """The module that holds a site's merged weight and bias, packed as the one that is there, or dense.

    `quantized` may be None where the weight stays what it is.
    """
    module = model.get_submodule(site.module)
    held = packed(module)
    assert held is not None
    weight, bias = merged.get(site.weight), merged.get(site.bias)
    if quantized == DEQUANTIZE:
        return _dense(model, held, weight, bias)
    made = held.scheme.share(module) if weight is None else held.scheme.pack(weight, module)
    if bias is not None:
        made._parameters["bias"] = nn.Parameter(bias.to(_plain_type(model, held)), requires_grad=False)
    return made


def unpacked_modules(
    model: nn.Module, done: Collection[str], changed: Mapping[str, torch.Tensor]
) -> dict[str, nn.Module]:
    """A dense module for every one of the model that stores its weight packed, but for those that are done already.

    `changed` are tensors that others have taken the place of: biases among them.
    """
    left = {name: held for name, held in packed_modules(model).items() if name not in done}
    return {name: _dense(model, held, bias=changed.get(f"{name}.bias")) for name, held in left.items()}


def in_types_of(
    model: nn.Module, changes: Mapping[str, torch.Tensor | nn.Module]
) -> dict[str, torch.Tensor | nn.Module]:
    """The changes in the types that the model has there: another may have computed them in float32."""
    found: dict[str, torch.Tensor | nn.Module] = {}
    made: dict[tuple[int, torch.dtype], torch.Tensor] = {}  # what is one tensor stays one
    for name, value in changes.items():
        if isinstance(value, nn.Module):
            held = packed(model.get_submodule(name))
            found[name] = value if held is None else _in_type(value, _plain_type(model, held))
            continue
        owner, _, leaf = name.rpartition(".")
        there = model.get_submodule(owner)._parameters.get(leaf)
        if there is None or there.dtype == value.dtype:
            found[name] = value
            continue
        key = id(value), there.dtype
        if key not in made:
            made[key] = nn.Parameter(value.detach().to(there.dtype), requires_grad=False)
        found[name] = made[key]
    return found


def forget_quantization(model: nn.Module) -> None:
    """Take the marks of quantization off a transformers model in which nothing is packed any more."""
    quantizer: Any = getattr(model, contract.QUANTIZER, None)
    if quantizer is not None and not packed_modules(model):
        quantizer.remove_quantization_config(model)
        for name in contract.QUANTIZED_BITS:
            model.__dict__.pop(name, None)


def _dense(
    model: nn.Module, held: Packed, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> nn.Linear:
    kind = _plain_type(model, held)
    value = held.unpack() if weight is None else weight
    bias = held.module._parameters.get("bias") if bias is None else bias
    made = nn.Linear(held.packing.in_features, held.packing.out_features, bias is not None, device="meta")
    made.weight = nn.Parameter(value.to(kind), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(kind), requires_grad=False)
    return made


def _in_type(module: nn.Module, kind: torch.dtype) -> nn.Module:
    bias = module._parameters.get("bias")
    if packed(module) is None:
        return module.to(kind)
    if bias is not None:
        module._parameters["bias"] = nn.Parameter(bias.detach().to(kind), requires_grad=False)
    return module


def _plain_type(model: nn.Module, held: Packed) -> torch.dtype:
    """The type of the model's dense weights: some packed ones do not say what they were made from."""
    if held.packing.dtype != torch.float32:
        return held.packing.dtype
    found = (each.dtype for each in model.parameters() if each.is_floating_point() and type(each) is nn.Parameter)
    return next(found, held.packing.dtype)
