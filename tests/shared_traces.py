"""Traces of transformers models, made once in a process and shared by all tests whose models are alike.

A trace is of a structure and knows no weights, so models of one configuration need one. Which structure that is, is
told by everything that a forward can read: the config, every module's class and plain attributes, and what is known of
every tensor but its numbers. A model of classes that are not transformers' or torch's own, or with hooks, is traced
itself. `tests/compiler/trace`, which is about tracing, does not use this.
"""

import json
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from peftc.compiler.api import Compiler
from peftc.compiler.trace.trace import Tracer
from peftc.passes.ir.traced import Traced
from peftc.passes.plan.plain import plain_class
from peftc.passes.quantized.schemes.known import packed
from peftc.runtime.execution import nest
from peftc.runtime.execution.call import Call
from peftc.runtime.regions.region import RegionCall, RegionTrace

KNOWN = ("transformers.", "torch.")
_MOST = 60  # traces of models kept, the last used ones
_MOST_REGIONS = 400
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PLAIN = (str, int, float, bool, type(None))
_SPELLED = (tuple, list, dict, torch.dtype)


class SharedTraces:
    """Traces by what they depend on."""

    def __init__(self) -> None:
        self._made: OrderedDict[Hashable, Traced] = OrderedDict()
        self._regions: OrderedDict[Hashable, RegionTrace] = OrderedDict()
        self._trace = Tracer.trace
        self._trace_region = Compiler.trace_region

    def trace(self, tracer: Tracer, call: Call) -> Traced:
        """What the tracer's own method gives."""
        structure = structure_of(tracer._source)
        if structure is None:
            return self._trace(tracer, call)
        key = (structure, call.signature, call.rows, tuple(_facts(each) for each in call.tensors))
        if key not in self._made:
            self._made[key] = self._trace(tracer, call)
        self._made.move_to_end(key)
        while len(self._made) > _MOST:
            self._made.popitem(last=False)
        return self._made[key]

    def trace_region(self, compiler: Compiler, module: nn.Module, call: RegionCall) -> RegionTrace:
        """What the compiler's own method gives."""
        structure = structure_of_region(module)
        if structure is None:
            return self._trace_region(compiler, module, call)
        leaves: list[torch.Tensor] = []
        given = (*call.args, *call.kwargs.values())
        forms = tuple(nest.flatten(each, leaves, "") for each in given)
        same = tuple(next(at for at, other in enumerate(leaves) if other is each) for each in leaves)
        cache = None if call.cache is None else (type(call.cache), *map(type, getattr(call.cache, "layers", ())))
        key = (structure, len(call.args), tuple(call.kwargs), forms, tuple(map(_facts, leaves)), same, cache)
        key = (*key, call.exact, call.numbered, torch.is_grad_enabled())
        if call.cache is not None:  # its length goes into the trace's sizes
            key = (*key, repr([_sizes(call.cache, at) for at in range(len(cache or ()) - 1)]))
        if key not in self._regions:
            self._regions[key] = self._trace_region(compiler, module, call)
        self._regions.move_to_end(key)
        while len(self._regions) > _MOST_REGIONS:
            self._regions.popitem(last=False)
        return self._regions[key]


def _sizes(cache: Any, layer: int) -> Any:
    try:
        return cache.get_mask_sizes(2, layer)
    except ValueError:  # of layers without attention there is none
        return None


def structure_of_region(module: nn.Module) -> Hashable | None:
    """All that a trace of a layer can depend on, or None where nobody can tell."""
    found: list[Hashable] = []
    for name, each in module.named_modules():
        kind = plain_class(each)
        if not kind.__module__.startswith(KNOWN) or packed(each) is not None:
            return None
        plain = sorted((key, repr(value)) for key, value in vars(each).items() if isinstance(value, _PLAIN))
        configs = [value for value in vars(each).values() if isinstance(value, PreTrainedConfig)]
        told = [
            json.dumps({**c.to_dict(), "attention": c._attn_implementation}, sort_keys=True, default=repr)
            for c in configs
        ]
        others = sorted(
            (key, repr(value) if isinstance(value, _SPELLED) else getattr(value, "__qualname__", ""))
            for key, value in vars(each).items()
            if not key.startswith("_") and not isinstance(value, (*_PLAIN, PreTrainedConfig, torch.Tensor))
        )
        if any(isinstance(value, torch.Tensor) for value in vars(each).values()):
            return None
        found.append((name, kind, tuple(plain), tuple(told), tuple(others)))
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    return tuple(found), tuple((name, first.setdefault(id(each), name), *_facts(each)) for name, each in named)


def structure_of(model: nn.Module) -> Hashable | None:
    """All that a trace of the model can depend on, or None where nobody can tell."""
    if not isinstance(model, PreTrainedModel):
        return None
    modules = []
    for name, module in model.named_modules():
        kind = type(module)
        if not kind.__module__.startswith(KNOWN) or "forward" in vars(module):
            return None
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return None
        plain = sorted((key, repr(value)) for key, value in vars(module).items() if isinstance(value, _PLAIN))
        modules.append((name, kind, tuple(plain)))
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    tensors = tuple((name, first.setdefault(id(tensor), name), *_facts(tensor)) for name, tensor in named)
    return tuple(modules), tensors, _told(model.config)


def _told(config: PreTrainedConfig) -> str:
    """All that a config says."""
    said = {**config.to_dict(), "attention": config._attn_implementation}
    return json.dumps(said, sort_keys=True, default=repr)


def _facts(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    return type(tensor), tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad


_SHARED = SharedTraces()


@pytest.fixture(autouse=True, scope="module")
def shared_traces() -> Iterator[None]:
    """Tests of this module trace alike models once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracer, "trace", lambda tracer, call: _SHARED.trace(tracer, call))
        patch.setattr(
            Compiler, "trace_region", lambda compiler, module, call: _SHARED.trace_region(compiler, module, call)
        )
        yield
