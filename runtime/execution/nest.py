"""Takes nested arguments and outputs apart into a flat list of tensors and a hashable form, and puts them together.

A form is nested tuples, so that it can key a dictionary, also while torch.compile traces the call.
"""

import dataclasses
from typing import Any

import torch
from transformers.cache_utils import Cache

from peftc.grammar.diagnostics import UsageError, fail

Form = tuple[Any, ...]

TENSOR, CONSTANT, SEQUENCE, MAPPING, FIELDS, CACHE = "tensor", "constant", "sequence", "mapping", "fields", "cache"
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)


def flatten(value: Any, leaves: list[torch.Tensor], where: str) -> Form:
    """The form of a value; its tensors are appended to `leaves` in order.

    A transformers Cache is one opaque item here: see `peftc.runtime.execution.caches`. Raises UsageError for a value
    that is neither a tensor, a plain constant, a cache nor a container of these; `where` names it.
    """
    if isinstance(value, torch.Tensor):
        leaves.append(value)
        return (TENSOR, value.dtype, value.dim())
    if isinstance(value, _CONSTANTS):
        return (CONSTANT, value, type(value))  # 1 == True == 1.0, and a model may care
    if isinstance(value, Cache):
        return (CACHE,)
    if isinstance(value, dict) and dataclasses.is_dataclass(value):  # outputs of transformers and of diffusers are both
        items = [(name, flatten(each, leaves, f"{where}.{name}")) for name, each in value.items()]
        return (FIELDS, type(value), tuple(items))
    if isinstance(value, dict):
        items = [(name, flatten(each, leaves, f"{where}.{name}")) for name, each in value.items()]
        return (MAPPING, type(value), tuple(items))
    if isinstance(value, tuple | list):
        return (SEQUENCE, type(value), tuple(flatten(each, leaves, f"{where}[{i}]") for i, each in enumerate(value)))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [each.name for each in dataclasses.fields(value)]
        items = [(name, flatten(getattr(value, name), leaves, f"{where}.{name}")) for name in names]
        return (FIELDS, type(value), tuple(items))
    fail(UsageError, "E501", f"{where} is of type {type(value).__name__}, which cannot enter or leave a traced graph")


def rebuild(form: Form, leaves: list[torch.Tensor], cache: Any = None) -> Any:
    """The value of a form. Takes tensors off the front of `leaves`."""
    match form[0]:
        case "tensor":
            return leaves.pop(0)
        case "constant":
            return form[1]
        case "cache":
            return cache
        case "fields":
            return form[1](**{name: rebuild(each, leaves, cache) for name, each in form[2]})
        case "mapping":
            return form[1]((name, rebuild(each, leaves, cache)) for name, each in form[2])
    items = [rebuild(each, leaves, cache) for each in form[2]]
    if form[1] is list:
        return items
    if form[1] is tuple:
        return tuple(items)
    return form[1](*items) if hasattr(form[1], "_fields") else form[1](items)


def holds_cache(form: Form) -> bool:
    """Whether a cache is anywhere in the form."""
    if form[0] == CACHE:
        return True
    if form[0] in (FIELDS, MAPPING):
        return any(holds_cache(each) for _, each in form[2])
    return form[0] == SEQUENCE and any(holds_cache(each) for each in form[2])


def count_tensors(form: Form) -> int:
    """How many tensors the form takes."""
    if form[0] == TENSOR:
        return 1
    if form[0] in (FIELDS, MAPPING):
        return sum(count_tensors(each) for _, each in form[2])
    return sum(count_tensors(each) for each in form[2]) if form[0] == SEQUENCE else 0
