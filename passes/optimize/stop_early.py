"""Stops gradients where values come from, and not where they arrive."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.pass_manager import Change, Miss
from peftc.passes.ir.stages import Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class StopEarly:
    """detach(f(a, b))  ->  f(detach(a), detach(b)),  where nothing else reads f(a, b)

    A detached tensor holds on to the one it was made from, and that to all that its gradient would need: of a norm the
    whole weight. What comes after the stop keeps nothing.
    """

    name: ClassVar[str] = "stop-early"
    leaves: ClassVar[Stage] = Stage.ADAPTED

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        made, removed, misses = 0, 0, list[Miss]()
        waiting = graph.find_nodes(op="call_function", target=aten.detach.default)
        while waiting:
            stop = waiting.pop()
            found = self.check(stop)
            if isinstance(found, Miss):
                if isinstance(origin := stop.meta.get("peftc"), Origin):
                    misses.append(replace(found, site=origin.site))
                continue
            emit = Emit(graph, found, found.meta["peftc"], like=found)
            for operand in found.all_input_nodes:
                if _has_history(operand):
                    found.replace_input_with(operand, emit.call(aten.detach.default, operand))
            stop.replace_all_uses_with(found)
            graph.erase_node(stop)
            waiting += emit.made
            made, removed = made + len(emit.made), removed + 1
        return Change(made, removed, tuple(misses))

    def check(self, stop: fx.Node) -> fx.Node | Miss:
        """What to stop the operands of, in place of its result."""
        (value,) = stop.all_input_nodes
        if not isinstance(stop.meta.get("peftc"), Origin):
            return Miss("the model itself stops this gradient", stop)
        if value.op != "call_function" or not isinstance(value.meta.get("peftc"), Origin):
            return Miss("the value is a tensor of the model's or of an adapter's, or an activation", value)
        if value.target is aten.detach.default:
            return Miss("the gradient is stopped already", value)
        if len(value.users) > 1:
            return Miss("what else reads the value has a gradient", value)
        if not all(isinstance(each.meta["val"], torch.Tensor) for each in value.all_input_nodes):
            return Miss("an operand is one of several results", value)
        return value


def _has_history(operand: fx.Node) -> bool:
    """Whether a gradient may reach an operand: not one that is stopped, a scalar of an adapter's, or whole numbers."""
    value = operand.meta["val"]
    is_scalar = operand.op == "get_attr" and value.dim() == 0
    is_continuous = value.is_floating_point() or value.is_complex()
    return operand.target is not aten.detach.default and is_continuous and not is_scalar
