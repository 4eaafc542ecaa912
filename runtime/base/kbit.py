"""Makes a quantized base ready to be trained on, as PEFT's `prepare_model_for_kbit_training` does."""

import torch
from torch import nn

from peftc.passes.quantized.schemes.known import packed, packed_modules

HALF = (torch.float16, torch.bfloat16)


def widened_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every float16 or bfloat16 parameter but packed weights, in float32; tied ones stay tied.

    Norms, biases, the head and the embeddings of a quantized model are a small part of it, and what they round is lost
    to the gradients of every layer below. Empty where nothing is packed.
    """
    if not packed_modules(model):
        return {}
    made: dict[int, nn.Parameter] = {}
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        stored = ("weight",) if packed(module) is not None else ()
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.dtype in HALF and leaf not in stored:
                wide = made.setdefault(id(parameter), nn.Parameter(parameter.detach().float(), requires_grad=False))
                found[f"{path}.{leaf}".lstrip(".")] = wide
    return found
