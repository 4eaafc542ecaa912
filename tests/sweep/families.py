"""The families of architectures: which types are in each, and how a tiny model of a type is made."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.sweep import compare  # noqa: F401  children are forked with everything imported
from tests.sweep.others import DIFFUSERS, TIMM, Make, made_by_diffusers, made_by_timm
from tests.sweep.shrink import Shrink

transformers.logging.set_verbosity_error()

OTHERS: Mapping[str, Iterable[str]] = {"diffusers": tuple(DIFFUSERS), "timm": TIMM}
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "causal": ("CAUSAL_LM",),
    "vision-language": ("IMAGE_TEXT_TO_TEXT",),
    "masked": ("MASKED_LM",),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "classification": ("SEQUENCE_CLASSIFICATION",),
    "vision": ("IMAGE_CLASSIFICATION",),
    "speech": ("SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION"),
    "detection": ("OBJECT_DETECTION",),
    "diffusers": (),
    "timm": (),
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
    if family in OTHERS:
        yield from OTHERS[family]
        return
    yield from (name for name in classes(family) if name not in before)


def made(family: str, name: str) -> tuple[nn.Module, int | Make]:
    """A tiny model of a type, and the side of its images, or its batch."""
    if family in OTHERS:
        return made_by_timm(name) if family == "timm" else made_by_diffusers(name)
    torch.manual_seed(0)
    kind: Any = getattr(transformers, classes(family)[name])
    config: Any = Shrink().config(kind.config_class or CONFIG_MAPPING[name], OVERRIDES.get(name))
    model: nn.Module = kind(config)
    return model.float(), image_side(config, 64 if family in LARGE else 32)


def image_side(config: Any, default: int) -> int:
    """How many pixels wide a model's images are."""
    for part in ("", "vision_config", "encoder", "backbone_config"):
        own = getattr(config, part, None) if part else config
        side = getattr(own, "image_size", None)
        if side:
            return int(side[0] if isinstance(side, list | tuple) else side)
    return default


GLM = {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
QWEN = {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 10000.0}
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "donut-swin": {"window_size": 4, "image_size": 128},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 0, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "glm46v": {"text_config.rope_parameters": GLM},
    "glm4v": {"text_config.rope_parameters": GLM},
    "glm4v_moe": {"text_config.rope_parameters": GLM},
    "glm_ocr": {"text_config.rope_parameters": GLM},
    "glmga": {"text_config.rope_parameters": GLM},
    "glm5_next": {"text_config.index_kpool": 2},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "attention_layers": ["global", "local"],
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "exaone4_5": {"vision_config.window_size": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llava_next": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "granite4_vision": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lilt": {"hidden_size": 96, "intermediate_size": 96},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mobilebert": {"embedding_size": 32},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (32, 32), "axial_pos_shape": (8, 8)},
    "blip-2": {"image_token_index": 120, "num_query_tokens": 4},
    "instructblip": {"image_token_index": 120, "num_query_tokens": 4},
    "instructblipvideo": {"video_token_index": 120, "num_query_tokens": 4},
    "paddleocr_vl": {"text_config.rope_parameters": QWEN},
    "pix2struct": {"vision_config.patch_embed_hidden_size": 192},
    "qwen2_5_vl": {"text_config.rope_parameters": QWEN, "vision_config.window_size": 32},
    "qwen2_5_omni_thinker": {"text_config.rope_parameters": QWEN, "vision_config.window_size": 32},
    "qwen2_vl": {"text_config.rope_parameters": QWEN},
    "swin": {"window_size": 4, "image_size": 128},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xmod": {"default_language": "en_XX"},
}
"""Fields that no rule finds: sizes that depend on one another in a way of the type's own."""
