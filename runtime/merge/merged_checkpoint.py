"""Writes a merged model as a checkpoint, weight by weight: the merged weights are never all there at once."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory  # type: ignore[attr-defined]
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from peftc.passes.expression.apply import compose
from peftc.runtime.adapters.bank import AdapterParameters
from peftc.runtime.files.tensor_file import TYPES, Entry, write_tensors
from peftc.runtime.merge.merge import Terms, bias_of, check_finite, merged_site, merged_sites

PATTERN, INDEX = "model{suffix}.safetensors", "model.safetensors.index.json"

Merging = Sequence[tuple[AdapterParameters, float]]
"""What is merged: adapters, and their weights."""


def can_stream(plain: nn.Module, active: Merging) -> bool:
    """Whether a merged model can be written weight by weight and be laid out as transformers would have it.

    Not where an adapter trains copies or rows, where weights are stored packed, where a tied weight is merged for one
    of its uses, where a module is given a bias, or where checkpoints of this class have other tensors than the model.
    """
    if not isinstance(plain, PreTrainedModel) or plain.is_remote_code():
        return False
    if not is_one_by_one(plain, active):
        return False
    tensors = _saved(plain)
    if any(each.dtype not in TYPES or type(each) not in (torch.Tensor, nn.Parameter) for each in tensors.values()):
        return False
    laid_out = _laid_out(plain, tensors)
    return {name: each.shape for name, each in laid_out.items()} == {name: each.shape for name, each in tensors.items()}


def is_one_by_one(model: nn.Module, active: Merging) -> bool:
    """Whether what merging changes are dense weights and biases that are there, each by the adapters of its site."""
    if any(each.plan.copies or each.plan.rows for each, _ in active):
        return False
    sites = [(terms[0][2].site, _changes_bias(model, terms)) for terms in merged_sites(active)]
    return not any(
        site.packing is not None or site.tied or (bias and bias_of(model, site) is None) for site, bias in sites
    )


def merging_terms(model: nn.Module, active: Merging) -> dict[str, Terms]:
    """The full name of every tensor that merging changes, and what changes it. See `is_one_by_one`."""
    found: dict[str, Terms] = {}
    for terms in merged_sites(active):
        site = terms[0][2].site
        found[site.weight] = terms
        if _changes_bias(model, terms):
            found[site.bias] = terms
    return found


@torch.no_grad()
def write_merged(
    directory: Path, plain: PreTrainedModel, base: nn.Module, active: Merging, *, size: int | str, safe: bool
) -> None:
    """Fill an empty directory as `save_pretrained` would: the config, the shards of at most this size, their index.

    `plain` has what is not merged. What is, is computed over the tensors of `base` when its turn comes, and let go.
    Raises UsageError, with `safe`, for a value that is not finite, and OSError.
    """
    merging = merging_terms(base, active)
    tensors = _saved(plain)
    entries = {
        name: Entry.like(name, value, merged_value(base, name, value, merging.get(name), safe))
        for name, value in ((name, tensors[name]) for name in _laid_out(plain, tensors))
    }
    split = split_state_dict_into_shards_factory(
        entries, get_storage_size=_size, filename_pattern=PATTERN, max_shard_size=size
    )
    _write_config(plain, directory)
    for file, names in split.filename_to_tensors.items():
        write_tensors(directory / file, [entries[name] for name in names])
    if split.is_sharded:
        _write_index(directory / INDEX, split.tensor_to_filename, plain.num_parameters(), entries)


def _changes_bias(model: nn.Module, terms: Terms) -> bool:
    primes = [(at.bound.weight, at.bound.bias) for _, _, at in terms]
    return compose(primes, bias_of(model, terms[0][2].site) is not None)[1] is not None


def _saved(plain: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What of a model transformers saves: a tied tensor once."""
    tensors: dict[str, torch.Tensor] = remove_tied_weights_from_state_dict(plain.state_dict(), plain)
    ignored = set(plain._keys_to_ignore_on_save or ())
    return {name: each for name, each in tensors.items() if name not in ignored}


def _laid_out(plain: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of this class in their order, without their numbers."""
    shapes = {name: torch.empty_like(value, device="meta") for name, value in tensors.items()}
    return dict(revert_weight_conversion(plain, shapes))


def _size(entry: Entry) -> int:
    return entry.size


def merged_value(
    base: nn.Module, name: str, own: torch.Tensor, terms: Terms | None, safe: bool
) -> Callable[[], torch.Tensor]:
    """What computes a tensor of the merged model when its turn comes; `own` is the base's, which it is without terms.

    It raises UsageError, with `safe`, for a value that is not finite.
    """

    def value() -> torch.Tensor:
        if terms is None:
            return own
        merged = merged_site(base, terms)
        check_finite(merged, safe)
        return merged.get(name, own).to(own.dtype)

    return value


def _write_config(plain: Any, directory: Path) -> None:
    plain.config.dtype = str(plain.dtype).removeprefix("torch.")
    plain.config.architectures = [type(plain).__name__]
    plain.config.save_pretrained(directory)
    if plain.can_generate():
        plain.generation_config.save_pretrained(directory)


def _write_index(path: Path, files: Mapping[str, str], parameters: int, entries: Mapping[str, Entry]) -> None:
    total = {"total_parameters": parameters, "total_size": sum(each.size for each in entries.values())}
    index = {"metadata": total, "weight_map": dict(files)}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
