"""Room for adapters of other ranks: what a compiler's program, or an exported one, reads keeps its sizes when another
comes.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.nn.functional import pad

from peftc.grammar.syntax import tree
from peftc.passes.plan.plan import PlannedSite
from peftc.passes.plan.structure import fits_every_rank, site_slot, slot_role
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.adapters.slots import Weighed

BY_SITE = frozenset({"in", "out", "kernel"})


def roomy(active: Weighed, rank: int) -> dict[tuple[str, str], torch.Tensor]:
    """For slots and the names in them, what they have with the ranks of adapters that are not trained brought to one.

    What is beyond an adapter's own rank is zero, and changes no product. The adapter's own tensor becomes the beginning
    of that memory: what is written to it is seen.
    """
    found = {}
    for place, (adapter, _) in enumerate(active):
        for at in adapter.plan.sites:
            for role, axes in rank_axes(at):
                key = at.key(adapter.plan.name, next(each for each in at.bound.params if each.role == role))
                tensor = adapter.tensor(key)
                if not tensor.requires_grad and all(tensor.shape[axis] <= rank for axis in axes):
                    sizes = [rank if axis in axes else size for axis, size in enumerate(tensor.shape)]
                    found[site_slot(place, at.site.name), slot_role(role)] = _with_room(tensor, sizes)
    return found


def with_rank(adapter: AdapterParameters, rank: int) -> Mapping[str, torch.Tensor]:
    """For slots of this adapter active alone, by attribute path, zeros with its ranks brought to at least this one.

    Only those are there that have axes of a rank where a graph fits every one.
    """
    found = {}
    for at in adapter.plan.sites:
        for role, axes in rank_axes(at):
            key = at.key(adapter.plan.name, next(each for each in at.bound.params if each.role == role))
            tensor = adapter.tensor(key).detach()
            sizes = [max(rank, size) if axis in axes else size for axis, size in enumerate(tensor.shape)]
            found[f"{site_slot(0, at.site.name)}.{slot_role(role)}"] = tensor.new_zeros(sizes)
    return found


def largest(values: Sequence[torch.Tensor]) -> list[int]:
    """Along each axis the largest size that one of these has."""
    return [max(sizes) for sizes in zip(*(each.shape for each in values), strict=True)]


def padded(value: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """A value of this size: a smaller one ends in zeros, which change no product, or in tokens that there are not."""
    missing = [size - own for own, size in zip(value.shape, sizes, strict=True)]
    if not any(missing):
        return value
    if value.is_floating_point():
        return pad(value, [each for size in reversed(missing) for each in (0, size)])
    made = value.new_full(tuple(sizes), empty(value.dtype))
    made[tuple(map(slice, value.shape))] = value
    return made


def empty(dtype: torch.dtype) -> int:
    """What is there where an adapter has nothing: zero, or a token that there is not."""
    return torch.iinfo(dtype).max if dtype in (torch.int32, torch.int64) else 0


def largest_rank(adapter: AdapterParameters) -> int:
    """The largest rank that an adapter has where a graph fits every one; 0 where there is none."""
    ranks = [
        param.shape[axis]
        for at in adapter.plan.sites
        for role, axes in rank_axes(at)
        for param in at.bound.params
        for axis in axes
        if param.role == role
    ]
    return max(ranks, default=0)


def rank_axes(at: PlannedSite) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The parameters of a site that have axes of a rank, and which: those whose size is a hyperparameter."""
    if at.site.lead or not fits_every_rank(at.bound):
        return
    shapes = {rule.role: rule.shape for rule in at.bound.rule.params}
    for param in at.bound.params:
        shape = shapes.get(param.role, ())
        names = [size.id if isinstance(size, tree.Name) else "" for size in shape]
        axes = tuple(axis for axis, name in enumerate(names) if name and name not in BY_SITE)
        if axes and not param.shared and len(shape) == len(param.shape):
            yield param.role, axes


@torch.no_grad()
def _with_room(tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Memory of these sizes that begins, along every axis, with a tensor, which is moved there if it is not yet."""
    strides = torch.empty(sizes, device="meta").stride()
    storage, count = tensor.untyped_storage(), torch.Size(sizes).numel() * tensor.element_size()
    if tensor.stride() != strides or storage.nbytes() != count or tensor.storage_offset():
        whole = tensor.new_zeros(sizes)
        own = whole[tuple(map(slice, tensor.shape))]
        own.copy_(tensor)
        tensor.data = own
    return tensor.as_strided(sizes, strides, 0)
