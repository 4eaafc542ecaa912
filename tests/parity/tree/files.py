"""Adapters of random values as peft writes them, and as the formula has them."""

import copy
import functools
import tempfile
import warnings
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from torch import nn

from tests.parity.tree.formula import Adapter
from tests.parity.tree.subjects import Subject


@functools.cache
def files(subject: Subject) -> Path:
    """Adapters of random values as peft writes them, one in a folder."""
    place = Path(tempfile.mkdtemp(prefix="adapters"))
    base = subject.make()
    for number, (name, options) in enumerate(subject.files.items()):
        torch.manual_seed(number)
        config = peft.LoraConfig(**options, init_lora_weights=False)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():
            for each in model.parameters():
                if each.requires_grad:
                    each.add_(torch.randn_like(each) * 0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(str(place / name), save_embedding_layers=False)
    return place


def from_file(subject: Subject, name: str, dtype: torch.dtype) -> Adapter:
    """The adapter of a file, as the formula has it."""
    options = subject.files[name]
    pairs: dict[str, dict[str, nn.Parameter]] = {}
    copies = {}
    for key, value in load_file(files(subject) / name / "adapter_model.safetensors").items():
        path = key.removeprefix("base_model.model.")
        tensor = nn.Parameter(value)
        site, found, role = path.partition(".lora_")
        if found:
            pairs.setdefault(site, {})[role.removeprefix("embedding_").removesuffix(".weight")] = tensor
        else:
            tensor.data = tensor.data.to(dtype)
            copies[path] = tensor
    scale = options["lora_alpha"] / options["r"]
    return Adapter(
        scale, options.get("lora_dropout", 0.0), {at: (own["A"], own["B"]) for at, own in pairs.items()}, copies
    )
