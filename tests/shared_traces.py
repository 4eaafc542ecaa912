"""Traces of transformers models, made once in a process and shared by all tests whose models are alike.

A trace is of a structure and knows no weights, so models of one configuration need one. Which structure that is, is
told by everything that a forward can read: the config, every module's class and plain attributes, and what is known of
every tensor but its numbers. A model of classes that are not transformers' or torch's own, or with hooks, is traced
itself. `tests/compiler/trace`, which is about tracing, does not use this.
"""

import json
from collections import OrderedDict
from collections.abc import Hashable, Iterator

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from peftc.compiler.trace.trace import Tracer
from peftc.passes.ir.traced import Traced
from peftc.runtime.execution.call import Call

KNOWN = ("transformers.", "torch.")
_MOST = 60  # traces kept, the last used ones
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PLAIN = (str, int, float, bool, type(None))


class SharedTraces:
    """Traces by what they depend on."""

    def __init__(self) -> None:
        self._made: OrderedDict[Hashable, Traced] = OrderedDict()
        self._trace = Tracer.trace

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
    config = {**model.config.to_dict(), "attention": model.config._attn_implementation}
    return tuple(modules), tensors, json.dumps(config, sort_keys=True, default=repr)


def _facts(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    return type(tensor), tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad


_SHARED = SharedTraces()


@pytest.fixture(autouse=True, scope="module")
def shared_traces() -> Iterator[None]:
    """Tests of this module trace alike models once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracer, "trace", lambda tracer, call: _SHARED.trace(tracer, call))
        yield
