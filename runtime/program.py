"""A graph bound to live modules, ready to be called."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from peftc.passes.traced import Traced
from peftc.runtime import caches, nest
from peftc.runtime.call import Call
from peftc.runtime.slots import Slots


class Program:
    """Runs one graph: a signature of calls, a structure of adapters.

    The graph reads weights straight from the model's own leaf modules and adapters from slots, so a replaced parameter
    (moved, merged, switched) is seen by the next call.
    """

    def __init__(self, traced: Traced, graph: fx.Graph, model: nn.Module, slots: Slots):
        self.traced = traced
        self.form: nest.Form = traced.outputs  # type: ignore[assignment]
        self.layout: caches.Layout | None = traced.cache  # type: ignore[assignment]
        self.returns_cache = nest.holds_cache(self.form)
        self.module = _bind(graph, traced.constants, model, slots)

    def fits(self, call: Call) -> bool:
        """Whether the sizes the trace is bound to are those of the call."""
        for tensor, sizes in zip(call.tensors, self.traced.shapes, strict=False):
            for axis, size in enumerate(sizes):
                if size is not None and tensor.shape[axis] != size:
                    return False
        return True

    def __call__(self, call: Call) -> Any:
        """Run the call, and put the output together as the model would have."""
        tensors = call.tensors
        if call.cache is not None:
            assert self.layout is not None
            tensors = tensors + caches.read(call.cache, self.layout, call.rows, tensors[0].device)
        leaves = list(self.module.forward(*tensors))
        cache = call.cache
        if self.returns_cache:
            assert self.layout is not None
            count = nest.count_tensors(self.form)
            kept, leaves = leaves[count:], leaves[:count]
            if cache is None:
                cache = caches.build(self.layout, kept)
            else:
                caches.store(cache, self.layout, kept)
        return nest.rebuild(self.form, leaves, cache)


def _bind(
    graph: fx.Graph, constants: Mapping[str, torch.Tensor | nn.Module], model: nn.Module, slots: Slots
) -> fx.GraphModule:
    """Takes the graph over: a GraphModule whose direct children are the live leaf modules it reads.

    So attribute paths are short, which a call with hundreds of weights notices, and nothing is copied.
    """
    root = nn.Module()
    owners: dict[str, str] = {}
    live: dict[str, nn.Module] = {}
    for node in graph.find_nodes(op="get_attr"):
        target = str(node.target)
        if target in constants:
            node.target = f"constant_{target.replace('.', '_')}"
            _set(root, node.target, constants[target])
            continue
        owner, _, leaf = target.rpartition(".")
        short = owners.setdefault(owner, f"m{len(owners)}")
        live[short] = slots.module(owner) if owner.startswith(("slots.", "copies.")) else model.get_submodule(owner)
        root._modules[short] = live[short]
        node.target = f"{short}.{leaf}"
    module = fx.GraphModule(root, graph, class_name="AdaptedGraph")
    # GraphModule made containers of its own with the tensors of this moment; the live modules take their place.
    module._modules.update(live)
    module.training = False
    return module


def _set(root: nn.Module, name: str, value: torch.Tensor | nn.Module) -> None:
    if isinstance(value, nn.Module):
        root.add_module(name, value)
    else:
        root.register_buffer(name, value, persistent=False)
