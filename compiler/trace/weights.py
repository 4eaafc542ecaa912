"""The graph of a module's own tensors alone, for a module whose forward has no graph but whose weights are adapted."""

from collections.abc import Sequence

import torch
from torch import fx, nn

from peftc.compiler.trace.twin import Twin
from peftc.passes.ir.traced import Traced
from peftc.runtime.regions.within import HEAD


def trace_weights(module: nn.Module, names: Sequence[str]) -> Traced:
    """() -> (W, ...): the graph that reads these tensors of the module's own, and gives them."""
    alone = nn.Module()
    for at, name in enumerate(names):
        owner, _, leaf = name.rpartition(".")
        value = getattr(module.get_submodule(owner), leaf)
        alone.register_parameter(f"w{at}", nn.Parameter(value.detach(), requires_grad=False))
    twin = Twin(alone)
    graph = fx.Graph()
    given = []
    for at, name in enumerate(names):
        value = getattr(twin.model, f"w{at}")
        weight = graph.create_node("get_attr", f"{HEAD}.{name}")
        weight.meta["val"] = value
        with twin.mode:
            node = graph.call_function(torch.ops.aten.alias.default, (weight,))
            node.meta["val"] = torch.ops.aten.alias.default(value)
        node.meta["nn_module_stack"] = {HEAD: (HEAD, type(module))}
        given.append(node)
    graph.output(tuple(given))
    return Traced(graph, inputs=(), constants={}, outputs=None, cache=None)
