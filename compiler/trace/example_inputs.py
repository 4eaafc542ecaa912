"""Inputs to trace a transformers model with, made from its config."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

ROWS, LENGTH, TEXT = 2, 8, 32


def example_inputs(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Named arguments for one call of a transformers model; None for a model nothing is known of.

    The sizes are arbitrary where the graph is dynamic, and the config's own where it is not (image and audio sizes).
    """
    if not isinstance(model, PreTrainedModel):
        return None
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters
    main = model.main_input_name
    device, dtype = model.device, model.dtype
    inputs: dict[str, torch.Tensor] = {}
    if "input_ids" in accepted and (main == "input_ids" or "pixel_values" in accepted):
        inputs["input_ids"] = torch.ones((ROWS, LENGTH), dtype=torch.long, device=device)
        if "attention_mask" in accepted:
            inputs["attention_mask"] = torch.ones((ROWS, LENGTH), dtype=torch.long, device=device)
    if "pixel_values" in accepted:
        inputs["pixel_values"] = torch.zeros(_image_shape(config), dtype=dtype, device=device)
    if main == "input_features":
        inputs["input_features"] = torch.zeros(_feature_shape(config), dtype=dtype, device=device)
    if main == "input_values":
        inputs["input_values"] = torch.zeros((ROWS, 4000), dtype=dtype, device=device)
    if not inputs:
        return None
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = torch.ones((ROWS, LENGTH), dtype=torch.long, device=device)
    return inputs


def drawn_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """As `example_inputs`, with random tokens of a text of some length; empty for a model nothing is known of."""
    config: Any = getattr(model, "config", None)
    size = int(getattr(config, "vocab_size", None) or 2)
    inputs = example_inputs(model) or {}
    length = min(TEXT, int(getattr(config, "max_position_embeddings", None) or TEXT))
    shape = (ROWS, length) if set(inputs) <= {"input_ids", "attention_mask", "decoder_input_ids"} else None
    for name, tensor in inputs.items():
        if name.endswith("input_ids"):
            inputs[name] = torch.randint(size, shape or tuple(tensor.shape), device=tensor.device)
        elif name == "attention_mask":
            inputs[name] = torch.ones(shape or tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device)
    return inputs


def _image_shape(config: Any) -> tuple[int, int, int, int]:
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return ROWS, int(getattr(vision, "num_channels", 3)), int(height), int(width)


def _feature_shape(config: Any) -> tuple[int, int, int]:
    """Spectrograms: twice the encoder's positions, since its convolutions halve the length."""
    positions = getattr(config, "max_source_positions", None)
    return ROWS, int(getattr(config, "num_mel_bins", 80)), 2 * int(positions or 100)
