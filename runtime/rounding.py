"""Measures what merging costs: the rounding of the merged weights, and what it does to a model's outputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from peftc.runtime.bank import AdapterParameters
from peftc.runtime.drift import OutputDrift, TensorDrift
from peftc.runtime.merge import merged_site, merged_sites, replaced_tensors

EXACT = torch.float64


@torch.no_grad()
def tensor_drift(model: nn.Module, active: Sequence[tuple[AdapterParameters, float]]) -> tuple[TensorDrift, ...]:
    """The drift of every tensor that merging these adapters would compute, site by site. Changes nothing."""
    found: list[TensorDrift] = []
    changed = replaced_tensors(model, [adapter for adapter, _ in active])
    for terms in merged_sites(active):
        exact = merged_site(model, terms, exact=EXACT, changed=changed)
        for name, merged in merged_site(model, terms, changed=changed).items():
            difference = _largest(merged.to(EXACT) - exact[name])
            dtype = str(merged.dtype).removeprefix("torch.")
            found.append(TensorDrift(name, dtype, difference, _share(difference, _largest(exact[name]))))
    return tuple(found)


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
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, torch.Tensor) else None


def _numbers(output: Any) -> list[torch.Tensor]:
    logits = _logits(output)
    leaves = [logits] if logits is not None else pytree.tree_leaves(output)
    return [each for each in leaves if isinstance(each, torch.Tensor) and each.is_floating_point()]


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _share(part: float, whole: float) -> float:
    return part / whole if whole else part
