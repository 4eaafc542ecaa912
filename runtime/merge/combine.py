"""One low-rank update made of several: their sum, joined factors, singular values, and what agrees of them.

The ways, and what they are called, are PEFT's. All is computed in float32 at least.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from peftc.grammar.diagnostics import UsageError, fail
from peftc.grammar.spec.recipe import DENSE, JOINED, Recipe, like_kind
from peftc.passes.expression.precision import at_least_float32

Tensor = torch.Tensor


@dataclass(frozen=True)
class Update:
    """`scale * b @ a`, an adapter's at a site, and the weight it is to have: `a` is [rank, in], `b` [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float
    weight: float

    @property
    def factor(self) -> float:
        """Weight and scale in one."""
        return self.weight * self.scale


def check(recipe: Recipe) -> None:
    """Raise UsageError for a way that is not known (E581), or a setting that means nothing there (E584)."""
    if not recipe.is_known:
        fail(UsageError, "E581", f"there is no combination_type {recipe.kind!r}", help=like_kind(str(recipe.kind)))
    found = recipe.fault()
    if found is not None:
        fail(UsageError, "E584", found.message, help=found.help)


Turn = Callable[[Tensor], Tensor]
"""A weight `[out, in]` as its module stores it, a view of the same numbers, or that back."""


@torch.no_grad()
def combined(
    updates: Sequence[Update], recipe: Recipe, rank: int, stored: Turn, logical: Turn
) -> tuple[Tensor, Tensor]:
    """The factors [rank, in] and [out, rank], of scale one, that these updates make; with zeros where they need less.

    `stored` and `logical` turn an update to how its module stores weights and back: there is drawn what is dropped.
    They are of the first update's type. Raises UsageError where a bound is asked for that bounds nothing.
    """
    kind = updates[0].a.dtype
    wide = [replace(each, a=_wide(each.a), b=_wide(each.b)) for each in updates]
    if recipe.kind == JOINED:
        a, b = torch.cat([each.factor * each.a for each in wide]), torch.cat([each.b for each in wide], 1)
    elif recipe.is_dense:
        a, b = _taken_apart(wide, recipe, rank, stored, logical)
    else:
        roots = [math.sqrt(abs(each.factor)) for each in wide]
        signed = [math.copysign(root, each.factor) for root, each in zip(roots, wide, strict=True)]
        a, b = mixed([each.a for each in wide], signed, recipe), mixed([each.b for each in wide], roots, recipe)
    return _filled(a, 0, rank).to(kind), _filled(b, 1, rank).to(kind)


def mixed(tensors: Sequence[Tensor], weights: Sequence[float], recipe: Recipe) -> Tensor:
    """The weighted sum of what is kept of tensors of one shape; where they vote, the mean of those of the elected sign.

    Signs are those of before the weights, so that a negative weight takes away what it would have added.
    """
    kept = torch.stack([_kept(each, recipe) for each in tensors])
    factors = kept.new_tensor(list(weights)).reshape(-1, *(1,) * (kept.dim() - 1))
    if not recipe.mix.votes:
        return (kept * factors).sum(0)
    signs = kept.sign()
    votes = (kept if recipe.majority == "total" else signs).sum(0)
    agreed = signs == torch.where(votes >= 0, 1, -1)
    return (kept * factors * agreed).sum(0) / agreed.sum(0).clamp(min=1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(at_least_float32(tensor.dtype))


def _kept(tensor: Tensor, recipe: Recipe) -> Tensor:
    """The tensor with zeros for what is dropped."""
    density = recipe.density
    if not recipe.mix.dropped or density is None or density >= 1:
        return tensor
    if recipe.mix.dropped == "random":
        return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
    largest = tensor.abs().reshape(-1).topk(int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device).index_fill_(0, largest, 1)
    return tensor * mask.reshape(tensor.shape)


def _taken_apart(
    updates: Sequence[Update], recipe: Recipe, rank: int, stored: Turn, logical: Turn
) -> tuple[Tensor, Tensor]:
    if recipe.kind == DENSE and recipe.clamp is None:
        u, s, v = _thin(updates, recipe)
    else:
        dense = [stored(each.b @ each.a) * each.scale for each in updates]
        whole = logical(mixed(dense, [each.weight for each in updates], recipe))
        u, s, v = _singular(whole, recipe)
    b, a = u[:, :rank] * s[:rank], v[:rank]
    if recipe.clamp is None or a.is_meta:
        return a, b
    bound = _quantile(torch.cat([b.flatten(), a.flatten()]), recipe.clamp)
    if bound <= 0:
        message = f"svd_clamp = {recipe.clamp:g} bounds nothing: that quantile of the factors is {bound:.3g}"
        fail(UsageError, "E584", message, help="give one nearer to 1, such as 0.99")
    return a.clamp(-bound, bound), b.clamp(-bound, bound)


def _thin(updates: Sequence[Update], recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """The singular values of a sum of thin products, which no matrix of the weight's size is needed for."""
    b = torch.cat([each.factor * each.b for each in updates], 1)
    left, right = torch.linalg.qr(b), torch.linalg.qr(torch.cat([each.a for each in updates]).mT)
    u, s, v = _singular(left.R @ right.R.mT, recipe)
    return left.Q @ u, s, v @ right.Q.mT


def _singular(matrix: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    if recipe.driver is not None and not matrix.is_cuda:
        message = f"svd_driver {recipe.driver!r} is one of CUDA, and the adapters are on {matrix.device}"
        fail(UsageError, "E584", message, help="leave svd_driver out, or move the model")
    u, s, v = torch.linalg.svd(matrix, full_matrices=False, driver=recipe.driver)
    return u, s, v


def _quantile(values: Tensor, share: float) -> float:
    """As torch's, which takes no more than 16 million numbers."""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return float(torch.lerp(low, high, place - math.floor(place)))


def _filled(tensor: Tensor, axis: int, size: int) -> Tensor:
    """With zeros behind, up to a size along an axis."""
    missing = size - tensor.shape[axis]
    if missing <= 0:
        return tensor.contiguous()
    shape = list(tensor.shape)
    shape[axis] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)
