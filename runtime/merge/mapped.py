"""Merged tensors that lie in a file: computed one after the other, and in memory only while they are read."""

from pathlib import Path

import torch
from torch import nn

from peftc.runtime.artifact.tensors import read_tensors
from peftc.runtime.files.tensor_file import Entry, write_tensors
from peftc.runtime.merge.merge import Merged
from peftc.runtime.merge.merged_checkpoint import Merging, merged_value, merging_terms


@torch.no_grad()
def mapped_tensors(model: nn.Module, active: Merging, path: Path, *, safe: bool) -> Merged:
    """What `merged_tensors` gives for adapters that change weights only, in a new file.

    The file has to stay as long as the tensors. Raises UsageError, with `safe`, for a value that is not finite, and
    OSError.
    """
    terms = merging_terms(model, active)
    if not terms:
        return {}
    base = {name: model.get_parameter(name) for name in terms}
    write_tensors(
        path, [Entry.like(name, own, merged_value(model, name, own, terms[name], safe)) for name, own in base.items()]
    )
    found = read_tensors(path)
    return {name: nn.Parameter(found[name].to(own.device), requires_grad=False) for name, own in base.items()}
