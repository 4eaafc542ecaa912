"""Copies of a model that share its weights: new modules and new Parameter objects over the same storage."""

import copy

import torch
from torch import nn

from peftc.grammar.diagnostics import ModelError, fail
from peftc.passes.quantized.schemes.known import packed


def share(model: nn.Module, *, requires_grad: bool | None = None, leave_out: tuple[str, ...] = ()) -> nn.Module:
    """A structure copy of a model over the same weight storage.

    Parameters are new objects, so that moving, freezing or replacing them on the copy leaves the original alone; tied
    parameters stay tied. Buffers, which a forward may update in place, are cloned. `requires_grad` None keeps each
    parameter's own. Attributes named in `leave_out` are not copied. Raises ModelError if the model cannot be copied.
    """
    forward = model.__dict__.get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(model).forward:
        fail(
            ModelError,
            "E404",
            f"the forward of this {type(model).__name__} object was replaced",
            help="pass the model as its class defines it; hooks and patches on the object would be lost",
        )
    skipped = {name: getattr(model, name, None) for name in leave_out}
    memo: dict[int, object] = {id(value): None for value in skipped.values() if value is not None}
    for module in model.modules():
        held = packed(module)
        if held is not None:
            memo[id(module)] = held.scheme.share(module)
            continue
        for parameter in module.parameters(recurse=False):
            grad = parameter.requires_grad if requires_grad is None else requires_grad
            memo.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=grad))
        for buffer in module.buffers(recurse=False):
            memo.setdefault(id(buffer), buffer.detach().clone())
    try:
        copied = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        fail(
            ModelError,
            "E401",
            f"{type(model).__name__} cannot be copied: {error}",
            help="one of its modules holds something that cannot be copied: a lock, a file, a tensor with a history",
        )
    copied.__dict__.pop("forward", None)
    for name in leave_out:
        copied.__dict__.pop(name, None)
        copied._modules.pop(name, None)
    return copied


def placement(model: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and type of a model's first parameter, which a trace bakes in."""
    first = next(model.parameters(), None)
    return (None, None) if first is None else (first.device, first.dtype)
