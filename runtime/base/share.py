"""Copies of a model that share its weights: new modules and new Parameter objects over the same storage."""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from peftc.grammar.diagnostics import ModelError, fail
from peftc.passes.quantized.schemes.known import packed
from peftc.runtime.base.replaced import Replaced, put


def share(
    model: nn.Module,
    *,
    requires_grad: bool | None = None,
    leave_out: tuple[str, ...] = (),
    replaced: Replaced | None = None,
) -> nn.Module:
    """A structure copy of a model over the same weight storage.

    Parameters are new objects, so that moving, freezing or replacing them on the copy leaves the original alone; tied
    parameters stay tied. Buffers, which a forward may update in place, are cloned. `requires_grad` None keeps each
    parameter's own. Attributes named in `leave_out` are not copied. What is `replaced`, the copy has in place of the
    model's own, shared in the same way. Raises ModelError if the model cannot be copied.
    """
    replaced = replaced or {}
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
    for value in _held(model, replaced):
        if isinstance(value, nn.Parameter):
            grad = value.requires_grad if requires_grad is None else requires_grad
            memo.setdefault(id(value), nn.Parameter(value.detach(), requires_grad=grad))
        elif isinstance(value, torch.Tensor):
            memo.setdefault(id(value), value.detach().clone())
        elif (held := packed(value)) is not None:
            memo[id(value)] = held.scheme.share(value)
    try:
        copied = copy.deepcopy(model, memo)
        put(copied, {name: copy.deepcopy(value, memo) for name, value in replaced.items()})
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


def _held(model: nn.Module, replaced: Replaced) -> Iterator[torch.Tensor | nn.Module]:
    """What is not to be copied with its numbers: packed modules, and the tensors of the others."""
    for value in (model, *replaced.values()):
        for module in value.modules() if isinstance(value, nn.Module) else ():
            if packed(module) is not None:
                yield module
                continue
            yield from module.parameters(recurse=False)
            yield from module.buffers(recurse=False)
        if isinstance(value, torch.Tensor):
            yield value


def placement(model: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and type of a model's first parameter, which a trace bakes in."""
    first = next(model.parameters(), None)
    return (None, None) if first is None else (first.device, first.dtype)
