"""The families of architectures: which types are in each, and how a tiny model of a type is made."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.sweep import compare  # noqa: F401  children are forked with everything imported
from tests.sweep.shrink import Shrink

transformers.logging.set_verbosity_error()

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "causal": ("CAUSAL_LM",),
    "vision-language": ("IMAGE_TEXT_TO_TEXT",),
    "masked": ("MASKED_LM",),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "classification": ("SEQUENCE_CLASSIFICATION",),
    "vision": ("IMAGE_CLASSIFICATION",),
    "speech": ("SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION"),
    "detection": ("OBJECT_DETECTION",),
}
LARGE = ("vision", "detection")
"""Families whose models halve an image many times: theirs have 64 pixels a side, where the config says nothing."""


def classes(family: str) -> dict[str, str]:
    """The types of a family, with the class of the model."""
    found: dict[str, str] = {}
    for each in FAMILIES[family]:
        for name, kind in getattr(modeling_auto, f"MODEL_FOR_{each}_MAPPING_NAMES").items():
            found.setdefault(name, kind if isinstance(kind, str) else kind[0])
    return found


def types_of(family: str) -> Iterator[str]:
    """The types of a family that are in none before it."""
    before = set()
    for each in FAMILIES:
        if each == family:
            break
        before |= set(classes(each))
    yield from (name for name in classes(family) if name not in before)


def made(family: str, name: str) -> tuple[nn.Module, int]:
    """A tiny model of a type, and the side of its images."""
    torch.manual_seed(0)
    config: Any = Shrink().config(CONFIG_MAPPING[name], OVERRIDES.get(name))
    model: nn.Module = getattr(transformers, classes(family)[name])(config)
    return model.float(), image_side(config, 64 if family in LARGE else 32)


def image_side(config: Any, default: int) -> int:
    """How many pixels wide a model's images are."""
    for part in ("", "vision_config", "encoder", "backbone_config"):
        own = getattr(config, part, None) if part else config
        side = getattr(own, "image_size", None)
        if side:
            return int(side[0] if isinstance(side, list | tuple) else side)
    return default


OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
}
"""Fields that no rule finds: sizes that depend on one another in a way of the type's own."""
