"""Tracing while somebody else traces: an export, a compiler or a transform has come to a module that has no graph."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import tracing
from torch.export import _trace as export_trace
from torch.utils._python_dispatch import _disable_current_modes

_KEPT = ("_EXPORT_FLAGS", "_EXPORT_MODULE_HIERARCHY")  # what an export has in globals


@contextmanager
def outside() -> Iterator[None]:
    """Inside, nobody else traces, transforms or records what is done; afterwards they go on as before."""
    before = {name: getattr(export_trace, name) for name in _KEPT if hasattr(export_trace, name)}
    modes = []  # an export records with one of these that gradients are turned off
    while torch._C._len_torch_function_stack():
        modes.append(torch._C._pop_torch_function_stack())
    try:
        with temporarily_clear_interpreter_stack(), _disable_current_modes(), tracing(None):
            yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)
        for name, value in before.items():
            setattr(export_trace, name, value)
