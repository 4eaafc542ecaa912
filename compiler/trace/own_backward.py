"""Functions with a backward of their own, which a graph of their operators has not: whether it is another at all."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from peftc.compiler.trace.outside import from_outside
from peftc.runtime.execution.outside import outside

_NEAR = 1e-5


@contextmanager
def own_backward(noted: Callable[[str], None]) -> Iterator[None]:
    """Inside, tells the names of functions that a model calls and whose backward is not that of their operators.

    Many write out, for speed, what comes of the operators anyway; others, such as a straight-through estimator, do not.
    It is tried with random numbers.
    """
    original: Any = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        run = original.__get__(None, cls)
        if from_outside(sys._getframe(1)) and _is_another(cls, run, args, kwargs):
            noted(cls.__name__)
        return run(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def _is_another(cls: Any, run: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function's gradients are not those of its operators, or nobody can tell."""
    try:
        with outside(), torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            values, form = pytree.tree_flatten((tuple(args), dict(kwargs)))
            torch.manual_seed(0)
            samples = [_sample(each) for each in values]
            one = _gradients(run, samples, form)
            other = _gradients(lambda *a, **k: _forward(cls, a, k), samples, form)
            return len(one) != len(other) or not all(map(_is_near, one, other))
    except Exception:  # whatever a function says of numbers that it did not expect
        return True


def _forward(cls: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The forward of a function, as if it were no function but what it is made of."""
    if cls.setup_context is not torch.autograd.Function.setup_context:
        return cls.forward(*args, **kwargs)
    return cls.forward(_Context(len(args)), *args, **kwargs)


class _Context:
    """What a forward keeps things in for a backward that is not called."""

    def __init__(self, count: int):
        self.needs_input_grad = (True,) * count

    def _nothing(self, *_: Any) -> None: ...

    save_for_backward = save_for_forward = mark_dirty = mark_non_differentiable = set_materialize_grads = _nothing


def _sample(value: Any) -> Any:
    """Numbers in the place of a tensor."""
    if not isinstance(value, torch.Tensor):
        return value
    sizes = [each if isinstance(each, int) else each.node.hint for each in value.shape]
    if value.is_floating_point():
        return torch.randn(sizes, dtype=torch.float64)
    return torch.ones(sizes, dtype=value.dtype)


def _gradients(run: Callable[..., Any], samples: Sequence[Any], form: pytree.TreeSpec) -> list[torch.Tensor | None]:
    """What a function gives, and the gradients of a sum of it."""
    torch.manual_seed(1)
    given = [each.clone().requires_grad_(each.is_floating_point()) if _is_tensor(each) else each for each in samples]
    args, kwargs = pytree.tree_unflatten(given, form)
    outputs = [each for each in pytree.tree_leaves(run(*args, **kwargs)) if _is_tensor(each)]
    kept = [each for each in outputs if each.requires_grad]
    total: Any = sum((each * torch.linspace(0.5, 2, each.numel()).view(each.shape)).sum() for each in kept)
    inputs = [each for each in given if _is_tensor(each) and each.requires_grad]
    return [*(each.detach() for each in outputs), *torch.autograd.grad(total, inputs, allow_unused=True)]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_near(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        left = other if one is None else one
        return left is None or not left.any()
    if one.shape != other.shape:
        return False
    largest = float(other.abs().max()) if other.numel() else 0.0
    return bool(torch.allclose(one.double(), other.double(), rtol=_NEAR, atol=_NEAR * largest))
