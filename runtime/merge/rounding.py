"""Measures what merging costs: the rounding of the merged weights, and what it does to a model's outputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from peftc.passes.foreign.transformers import LOGITS
from peftc.passes.plan.site import Site
from peftc.passes.quantized.schemes.known import packed
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.merge.drift import OutputDrift, TensorDrift
from peftc.runtime.merge.merge import Merged, merged_site, merged_sites, replaced_tensors
from peftc.runtime.merge.repack import Quantized, check_packed, stored

EXACT = torch.float64


@torch.no_grad()
def tensor_drift(
    model: nn.Module, active: Sequence[tuple[AdapterParameters, float]], quantized: Quantized | None = None
) -> tuple[TensorDrift, ...]:
    """The drift of every tensor that merging these adapters would compute, site by site. Changes nothing.

    Of a weight that is stored packed, `quantized` says how it would be stored. Raises UsageError if it has to and does
    not.
    """
    check_packed(active, quantized)
    found: list[TensorDrift] = []
    changed = replaced_tensors(model, [adapter for adapter, _ in active])
    for terms in merged_sites(active):
        exact = merged_site(model, terms, exact=EXACT, changed=changed)
        computed = merged_site(model, terms, changed=changed)
        site, label = terms[0][2].site, ""
        if site.packing is not None and quantized is not None:
            computed, label = _as_stored(stored(model, site, computed, quantized), site, computed)
        for name, merged in computed.items():
            difference = _largest(merged.to(EXACT) - exact[name])
            dtype = label if label and name == site.weight else str(merged.dtype).removeprefix("torch.")
            found.append(TensorDrift(name, dtype, difference, _share(difference, _largest(exact[name]))))
    return tuple(found)


def _as_stored(module: nn.Module, site: Site, computed: Merged) -> tuple[Merged, str]:
    """What a module that holds merged tensors stands for, and what its way to store the weight is called."""
    held = packed(module)
    weight = module.get_parameter("weight") if held is None else held.unpack()
    values = {site.weight: weight, site.bias: module._parameters.get("bias")}
    found = {name: value.detach() for name, value in values.items() if name in computed and value is not None}
    return found, "" if held is None else held.packing.label


@torch.no_grad()
def output_drift(unmerged: Any, merged: Any, mask: torch.Tensor | None = None) -> OutputDrift:
    """The drift between two outputs of one call: of the logits if there are any, else of every tensor of numbers."""
    pairs = [(left.to(EXACT), right.to(EXACT)) for left, right in zip(*map(_numbers, (unmerged, merged)), strict=True)]
    differences = [(left - right).abs().flatten() for left, right in pairs]
    largest = max(map(_largest, differences), default=0.0)
    mean = float(torch.cat(differences).mean()) if sum(each.numel() for each in differences) else 0.0
    relative = _share(largest, max((_largest(left) for left, _ in pairs), default=0.0))
    if _logits(unmerged) is None or not differences:
        return OutputDrift(largest, mean, relative)
    left, right = (functional.log_softmax(each, -1) for each in pairs[0])
    divergence = (left.exp() * (left - right)).nansum(-1)  # what is impossible before and after adds nothing
    same = (left.argmax(-1) == right.argmax(-1)).to(EXACT)
    if mask is not None and mask.shape == same.shape:
        seen = mask.to(same.device, torch.bool)
        divergence, same = divergence[seen], same[seen]
    return OutputDrift(largest, mean, relative, max(0.0, float(divergence.mean())), float(same.mean()))


def in_evaluation(model: nn.Module, action: Callable[[], Any]) -> Any:
    """The action's result while the model is in evaluation mode; every module's own mode is given back."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return action()
    finally:
        for module, training in before:
            module.training = training


def _logits(output: Any) -> torch.Tensor | None:
    found = output.get(LOGITS) if isinstance(output, Mapping) else getattr(output, LOGITS, None)
    return found if isinstance(found, torch.Tensor) else None


def _numbers(output: Any) -> list[torch.Tensor]:
    logits = _logits(output)
    leaves = [logits] if logits is not None else pytree.tree_leaves(output)
    return [each for each in leaves if isinstance(each, torch.Tensor) and each.is_floating_point()]


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _share(part: float, whole: float) -> float:
    return part / whole if whole else part
