"""Hooks for modules, and a forward to put on one: functions of a file, so that models with them can be pickled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SEEN: list[torch.Tensor] = []
"""What hooks that only look have seen in the last call."""


def first(output: Any) -> Any:
    return output if isinstance(output, torch.Tensor) else output[0]


def _with_first(values: Any, new: torch.Tensor) -> Any:
    return new if isinstance(values, torch.Tensor) else (new, *values[1:])


def loss(logits: torch.Tensor) -> torch.Tensor:
    return torch.tanh(logits).mean()


def look(module: nn.Module, args: Any, output: Any) -> None:
    found = first(output)
    if isinstance(found, torch.Tensor):
        SEEN.append(found.detach().clone())


def steer(module: nn.Module, args: Any, output: Any) -> Any:
    if not isinstance(output, torch.Tensor | tuple):
        return None
    return _with_first(output, first(output) * 1.25)


def soften(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
        return (args[0] * 0.75, *args[1:]), kwargs
    named = {
        name: value * 0.75 if name == "hidden_states" and isinstance(value, torch.Tensor) else value
        for name, value in kwargs.items()
    }
    return args, named


def halve(module: nn.Module, into: Any, out: Any) -> Any:
    return tuple(each if each is None else each * 0.5 for each in into)


def skip(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return x * 0.5


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "look": lambda module: module.register_forward_hook(look),
    "steer": lambda module: module.register_forward_hook(steer),
    "soften": lambda module: module.register_forward_pre_hook(soften, with_kwargs=True),
    "halve": lambda module: module.register_full_backward_hook(halve),
}
KEPT = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
