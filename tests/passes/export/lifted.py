"""Small graphs, lifted, and run on real tensors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from peftc.passes.export.lift import Dimension, Lifted, lift
from peftc.passes.ir.inputs import InputSpec
from peftc.passes.ir.roles import Role

BATCH, SEQUENCE, PAST = Dimension("batch", 3), Dimension("sequence", 5, high=64), Dimension("past", 7, low=0)
X = InputSpec("x", axes=(("batch",), ("sequence",), 4))


def lifted(
    compute: Callable[..., Any],
    tensors: Mapping[str, torch.Tensor],
    *inputs: InputSpec,
    dimensions: Any = (),
) -> Lifted:
    """`compute(call, inputs, held)` emits nodes; `held` are the tensors' by name, and it gives the output."""
    graph = fx.Graph(owning_module=_holder(tensors))
    given = [graph.placeholder(each.name) for each in inputs]
    for node, spec in zip(given, inputs, strict=True):
        node.meta["val"] = torch.empty(0, dtype=dtype_of(spec))
    held = {name: graph.get_attr(name) for name in tensors}
    made = compute(graph.call_function, given, held)
    graph.output(made if isinstance(made, tuple) else (made,))
    return lift(graph, lambda name: (name, tensors[name]), inputs, dimensions or (BATCH, SEQUENCE))


def dtype_of(spec: InputSpec) -> torch.dtype:
    """Tokens and tasks are whole numbers."""
    return torch.int64 if spec.role in (Role.TOKENS, Role.TASKS) else torch.float32


def run(made: Lifted, *inputs: torch.Tensor) -> torch.Tensor:
    """What a lifted graph gives, its own tensors in front of the inputs."""
    with torch.no_grad():
        (found,) = fx.GraphModule(nn.Module(), made.graph)(*made.tensors.values(), *inputs)
    return found


def operators(made: Lifted) -> list[str]:
    """What the graph calls, in order."""
    return [str(node.target) for node in made.graph.nodes if node.op == "call_function"]


def _holder(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    holder = nn.Module()
    for name, value in tensors.items():
        holder.register_parameter(name, value) if isinstance(value, nn.Parameter) else holder.register_buffer(
            name, value
        )
    return holder
