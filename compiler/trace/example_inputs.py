"""Inputs to trace a transformers model with, made from its config."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peftc.passes.foreign import transformers as contract
from peftc.passes.ir.roles import Role, Stack

ROWS, LENGTH, TEXT, SAMPLES = 2, 8, 32, 4000

_IDS = tuple(contract.name_of(Role.TOKENS, stack) for stack in (Stack.ONLY, Stack.DECODER))
_TEXT = {*_IDS, contract.MASK, contract.name_of(Role.TYPES)}


def example_inputs(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Named arguments for one call of a transformers model; None for a model nothing is known of.

    The sizes are arbitrary where the graph is dynamic, and the config's own where it is not (image and audio sizes).
    An encoder that tells parts of a text apart is given the types of its tokens too, as its tokenizer gives them.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    config: Any = model.config
    forward = contract.forward_of(model.forward)
    main = model.main_input_name
    device, dtype = model.device, model.dtype
    ids, decoded = _IDS
    tokens = torch.ones((ROWS, LENGTH), dtype=torch.long, device=device)
    inputs: dict[str, torch.Tensor] = {}
    if forward.takes(ids) and (main == ids or forward.takes(contract.IMAGES)):
        inputs |= {ids: tokens, **forward.only({contract.MASK: tokens.clone()})}
        if contract.tells_parts(config) and not model.can_generate():
            inputs |= forward.only({contract.name_of(Role.TYPES): torch.zeros_like(tokens)})
    if forward.takes(contract.IMAGES):
        inputs[contract.IMAGES] = torch.zeros((ROWS, *contract.image_shape(config)), dtype=dtype, device=device)
    if main == contract.FEATURES:
        inputs[main] = torch.zeros((ROWS, *contract.feature_shape(config)), dtype=dtype, device=device)
    if main == contract.name_of(Role.SIGNAL):
        inputs[main] = torch.zeros((ROWS, SAMPLES), dtype=dtype, device=device)
    if not inputs:
        return None
    if contract.is_encoder_decoder(config) and forward.takes(decoded):
        inputs[decoded] = tokens.clone()
    return inputs


def drawn_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """As `example_inputs`, with random tokens of a text of some length; empty for a model nothing is known of."""
    config: Any = getattr(model, "config", None)
    size = contract.vocabulary_size(config)
    inputs = example_inputs(model) or {}
    length = min(TEXT, contract.most_positions(config) or TEXT)
    shape = (ROWS, length) if set(inputs) <= _TEXT else None
    for name, tensor in inputs.items():
        if name in _IDS:
            inputs[name] = torch.randint(size, shape or tuple(tensor.shape), device=tensor.device)
        elif name in _TEXT:
            inputs[name] = tensor[:1, :1].expand(shape or tensor.shape).contiguous()
    return inputs
