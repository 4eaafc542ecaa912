"""Merged tensors that lie in a file: computed one after the other, and in memory only while they are read."""

import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from peftc.runtime.merge import Merged, check_finite, merged_site
from peftc.runtime.merged_checkpoint import Merging, merging_terms
from peftc.runtime.tensor_file import Entry, places_of, write_tensors


@torch.no_grad()
def mapped_tensors(model: nn.Module, active: Merging, path: Path, *, safe: bool) -> Merged:
    """What `merged_tensors` gives for adapters that change weights only, in a new file.

    The file has to stay as long as the tensors. Raises UsageError, with `safe`, for a value that is not finite, and
    OSError.
    """
    terms = merging_terms(active)

    def value(name: str) -> torch.Tensor:
        found = merged_site(model, terms[name])
        check_finite(found, safe)
        return found.get(name, base[name])

    base: Mapping[str, torch.Tensor] = {name: model.get_parameter(name) for name in terms}
    entries = [
        Entry(name, each.dtype, tuple(each.shape), lambda name=name: value(name))  # type: ignore[misc]
        for name, each in base.items()
    ]
    if not entries:
        return {}
    write_tensors(path, entries)
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    places = places_of(entries)
    found: Merged = {}
    for each in entries:
        count = torch.Size(each.shape).numel()
        flat = torch.frombuffer(content, dtype=each.dtype, count=count, offset=places[each.name])
        found[each.name] = nn.Parameter(flat.view(each.shape).to(base[each.name].device), requires_grad=False)
    return found
