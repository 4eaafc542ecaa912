"""Binds what a trace calls a quantized linear to what the module really stores."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.ir.emit import Emit, Origin, fake_like
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.stages import Stage
from peftc.passes.plan.structure import storage_slot
from peftc.passes.quantized.packed_operators import PACKED_LINEAR, QUANTIZED_LINEAR, UNPACK
from peftc.passes.quantized.schemes.known import Packed

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerQuantized:
    """quantized_linear(x, W, b) -> packed_linear(x, b, [codes, scales, ...]);  f(W) -> f(unpack([codes, ...]))

    `packed` are the modules that store their weight packed. The weight is unpacked once for all that need its value,
    right before the first of them, so that no more than one layer's is there at a time. Where a merge has put a dense
    weight in the place of a packed one, a quantized linear becomes a linear.
    """

    packed: Mapping[str, Packed] = field(hash=False)
    training: bool
    name: ClassVar[str] = "lower-quantized"
    leaves: ClassVar[Stage] = Stage.BOUND

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        made = 0
        order = {node: index for index, node in enumerate(graph.nodes)}
        for weight in graph.find_nodes(op="get_attr"):
            module, _, leaf = str(weight.target).rpartition(".")
            held = self.packed.get(module) if leaf == "weight" else None
            if held is not None:
                made += self._bind(graph, weight, module, held, order)
        for node in graph.find_nodes(op="call_function", target=QUANTIZED_LINEAR):
            made += _dense(graph, node)
        return Change(made=made)

    def removes(self, node: fx.Node) -> bool:
        """Reads of the weights of packed modules, as they would be dense."""
        module, _, leaf = str(node.target).rpartition(".")
        return node.op == "get_attr" and leaf == "weight" and module in self.packed

    def _bind(self, graph: fx.Graph, weight: fx.Node, module: str, held: Packed, order: Mapping[fx.Node, int]) -> int:
        like = next(iter(weight.users))
        emit = Emit(graph, weight, Origin(self.name, module), like=like)
        slot = storage_slot(module)
        parts = [
            emit.slot(f"{slot}.p{index}", fake_like(part.shape, part.dtype, weight))
            for index, part in enumerate(held.parts)
        ]
        readers = sorted((each for each in weight.users if not _is_linear(each, weight)), key=order.__getitem__)
        for user in [each for each in weight.users if _is_linear(each, weight)]:
            own = Emit(graph, user, Origin(self.name, module), like=user)
            x, bias = user.args[0], user.args[2]
            linear = own.call(PACKED_LINEAR, x, bias, parts, held.packing.text, self.training)
            user.replace_all_uses_with(linear)
            graph.erase_node(user)
        if readers:
            own = Emit(graph, readers[0], Origin(self.name, module), like=readers[0])
            dense = own.call(UNPACK, parts, held.packing.text)
            for user in readers:
                user.replace_input_with(weight, dense)
        graph.erase_node(weight)
        return len(parts)


def _is_linear(user: fx.Node, weight: fx.Node) -> bool:
    return user.target is QUANTIZED_LINEAR and user.args[1] is weight and user.args[0] is not weight


def _dense(graph: fx.Graph, node: fx.Node) -> int:
    """A quantized linear over a dense weight: a linear in the weight's type, its result in that of the activation."""
    emit = Emit(graph, node, node.meta.get("peftc") or Origin(LowerQuantized.name), like=node)
    x, weight, bias = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    kind = weight.meta["val"].dtype
    own = emit.cast(bias, kind) if isinstance(bias, fx.Node) else None
    linear = emit.call(aten.linear.default, emit.cast(x, kind), weight, own)
    node.replace_all_uses_with(emit.cast(linear, x.meta["val"].dtype))
    graph.erase_node(node)
    return len(emit.made)
