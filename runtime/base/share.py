"""Copies of a model that share its weights: new modules and new Parameter objects over the same storage."""

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from peftc.grammar.diagnostics import ModelError, fail
from peftc.passes.plan.plain import make_plain, plain_class
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
    _check_forwards(model)
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
    make_plain(copied)
    for name in list(vars(copied)):
        vars(copied)[name] = rebound(vars(copied)[name], model, copied)
    for name in leave_out:
        copied.__dict__.pop(name, None)
        copied._modules.pop(name, None)
    for module in copied.modules():
        _drop_own_forward(module)
    return copied


def _drop_own_forward(module: nn.Module) -> None:
    """Take away a `forward` on an object that is its class's: an exporter leaves one, and the class may change."""
    forward = vars(module).get("forward")
    if isinstance(forward, types.MethodType) and forward.__func__ is type(module).forward:
        del module.forward


def rebound(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """A method, or what a library made of one, of one module as that of another."""
    if isinstance(value, types.MethodType) and value.__self__ is old:
        own = value.__func__ is plain_class(old).forward
        return types.MethodType(type(new).forward if own else value.__func__, new)
    if isinstance(value, functools.partial) and any(each is old for each in value.args):
        made = functools.partial(value.func, *(new if each is old else each for each in value.args), **value.keywords)
        vars(made).update({name: rebound(each, old, new) for name, each in vars(value).items()})
        return made
    return value


def _check_forwards(model: nn.Module) -> None:
    """Raise ModelError for a forward put on an object that would go on calling the original and not a copy."""
    modules = {id(each) for each in model.modules()}
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if not isinstance(forward, types.FunctionType):
            continue
        cells = [each.cell_contents for each in forward.__closure__ or () if _is_filled(each)]
        if module is model or any(id(each) in modules for each in cells):
            what = f"of {name}" if name else f"of this {type(model).__name__} object"
            help = "pass the model as its class defines it: that function would go on with the model it was made for"
            fail(ModelError, "E404", f"the forward {what} was replaced", help=help)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


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
