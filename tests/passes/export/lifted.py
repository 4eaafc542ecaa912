"""Small graphs, lifted, and run on real tensors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from peftc.passes.export.lift import Dimension, Given, Lifted, lift

BATCH, SEQUENCE, PAST = Dimension("batch", 3), Dimension("sequence", 5, high=64), Dimension("past", 7, low=0)
X = Given("x", (("batch",), ("sequence",), 4), torch.float32, torch.device("cpu"))


def lifted(
    compute: Callable[..., Any], tensors: Mapping[str, torch.Tensor], *inputs: Given, dimensions: Any = ()
) -> Lifted:
    """`compute(call, inputs, held)` emits nodes; `held` are the tensors' by name, and it gives the output."""
    graph = fx.Graph(owning_module=_holder(tensors))
    given = [graph.placeholder(each.name) for each in inputs]
    held = {name: graph.get_attr(name) for name in tensors}
    made = compute(graph.call_function, given, held)
    graph.output(made if isinstance(made, tuple) else (made,))
    return lift(graph, lambda name: (name, tensors[name]), inputs, dimensions or (BATCH, SEQUENCE))


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
