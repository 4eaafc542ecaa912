"""Calls operators the short way, for graphs that Python runs as they are."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from peftc.passes.ir.infer import OPERATOR
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.stages import Stage
from peftc.passes.quantized.packed_operators import PACKED_LINEAR, UNPACK, packed_linear, unpacked

aten = torch.ops.aten

# The same operator through torch's generated bindings: half the time of a call through torch.ops, which for a graph of
# hundreds of small operators is most of the difference between it and the model's own code.
NATIVE: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.addmm.default: torch.addmm,
    aten.addmm_.default: torch.Tensor.addmm_,
    aten.arange.default: torch.arange,
    aten.baddbmm.default: torch.baddbmm,
    aten.baddbmm_.default: torch.Tensor.baddbmm_,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.contiguous.default: torch.Tensor.contiguous,
    aten.cos.default: torch.cos,
    aten.div.Tensor: torch.div,
    aten.dropout.default: torch.dropout,
    aten.embedding.default: torch.embedding,
    aten.expand.default: torch.Tensor.expand,
    aten.gelu.default: torch._C._nn.gelu,
    aten.layer_norm.default: torch.layer_norm,
    aten.linear.default: torch._C._nn.linear,
    aten.matmul.default: torch.matmul,
    aten.mean.dim: torch.mean,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.relu.default: torch.relu,
    aten.reshape.default: torch.reshape,
    aten.rsqrt.default: torch.rsqrt,
    aten.scaled_dot_product_attention.default: torch._C._nn.scaled_dot_product_attention,
    aten.silu.default: torch._C._nn.silu,
    aten.sin.default: torch.sin,
    aten.softmax.int: torch.softmax,
    aten.sub.Tensor: torch.sub,
    aten.sym_size.int: torch.Tensor.size,
    aten.t.default: torch.t,
    aten.tanh.default: torch.tanh,
    aten.to.dtype: torch.Tensor.to,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: torch.Tensor.view,
    aten.__and__.Tensor: operator.and_,
    PACKED_LINEAR: packed_linear,
    UNPACK: unpacked,
}


@dataclass(frozen=True)
class NativeCalls:
    """torch.ops.aten.f(x)  ->  torch.f(x)"""

    name: ClassVar[str] = "native-calls"
    leaves: ClassVar[Stage] = Stage.NATIVE

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        made = 0
        for op, native in NATIVE.items():
            for node in graph.find_nodes(op="call_function", target=op):
                if _is_expressible(node):
                    node.meta[OPERATOR] = op
                    node.target = native
                    made += 1
        return Change(made=made)

    def removes(self, node: fx.Node) -> bool:
        """Operators that have a short way, called the long way."""
        return node.target in NATIVE and _is_expressible(node)


def _is_expressible(node: fx.Node) -> bool:
    """The bindings of `to` take a memory format by name only, and traces give it by place."""
    return not any(isinstance(each, torch.memory_format) for each in node.args)
