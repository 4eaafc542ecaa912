"""What modules store packed: where graphs read it, and what nothing may do to it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.plan.structure import storage_slot
from peftc.passes.quantized.schemes.known import packed, packed_modules


class Storage:
    """The stored tensors of a model's quantized modules, each module's under a path of its own.

    Libraries keep them in attributes of their own making; here they are buffers. `refresh` looks again, after a module
    was moved or replaced.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._modules: dict[str, tuple[str, nn.Module]] = {}

    def module(self, path: str) -> nn.Module:
        """The holder of this attribute path."""
        if path not in self._modules:
            self._modules |= {
                storage_slot(name): (name, nn.Module())
                for name, module in self._model.named_modules()
                if storage_slot(name) not in self._modules and packed(module) is not None
            }
            self.refresh()
        return self._modules[path][1]

    def refresh(self) -> None:
        """Take the tensors that are there now. What is no longer packed is let go."""
        for name, holder in self._modules.values():
            held = packed(self._model.get_submodule(name))
            parts = () if held is None else held.parts
            holder._buffers.clear()
            holder._buffers.update({f"p{index}": part for index, part in enumerate(parts)})


def check_trainable(model: nn.Module) -> None:
    """Raise UsageError where weights are stored packed: these cannot be trained."""
    held = packed_modules(model)
    if held:
        first, *more = held
        message = f"weights that are quantized ({held[first].packing.label}) cannot be trained: {first}"
        message += f" and {len(more)} more" if more else ""
        fail(UsageError, "E531", message, help="train adapters on them, or load the base unquantized")


def without_packed(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without what hangs on packed weights, which no module loads.

    Raises UsageError if it has other packed weights than the model.
    """
    left = dict(state_dict)
    for name, held in packed_modules(model).items():
        for key, tensor in held.module.state_dict(prefix=f"{name}.").items():
            if key in left and key != f"{name}.bias" and not _is_same(left[key], tensor):
                message = f"the quantized weight of {name} is another one in the state dict, and cannot be replaced"
                help = "load that base with from_pretrained, and put the adapters into it"
                fail(UsageError, "E532", message, help=help)
            if key.startswith(f"{name}.weight."):
                left.pop(key, None)
    return left


def _is_same(given: torch.Tensor, tensor: torch.Tensor) -> bool:
    if is_traceable_wrapper_subclass(tensor):
        names = tensor.__tensor_flatten__()[0]
        return type(given) is type(tensor) and all(_is_same(getattr(given, n), getattr(tensor, n)) for n in names)
    return given.shape == tensor.shape and torch.equal(_bytes(given.to(tensor)), _bytes(tensor))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """As numbers, some stored tensors are not equal to themselves, and some types cannot be compared."""
    return tensor.detach().flatten().view(torch.uint8)
