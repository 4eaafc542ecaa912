"""How a graph uses a site's weight: which activation meets it, under which operator, with which bias."""

from dataclasses import dataclass

import torch
from torch import fx
from torch._ops import OpOverload

from peftc.passes.expression.apply import Activation, Dense, OneHot
from peftc.passes.expression.convolve import CONVOLUTIONS, Patches
from peftc.passes.ir.emit import Emit
from peftc.passes.ir.pass_manager import Miss
from peftc.passes.plan.site import Site
from peftc.passes.quantized.packed_operators import QUANTIZED_LINEAR

aten = torch.ops.aten

LINEARS = (aten.linear.default, QUANTIZED_LINEAR)
LINEAR_KINDS = ("linear", "multihead_attention")


@dataclass(frozen=True)
class WeightUse:
    """A use of a weight that an activation can be pushed through: `linear(x, W, b)` in one of its spellings."""

    node: fx.Node
    x: Activation | Patches
    bias: fx.Node | None = None

    def rebase(self, weight: fx.Node, bias: fx.Node | None) -> None:
        """Read another weight, as it is stored, and another bias; None leaves the bias as it is."""
        replaced = {1: weight}
        match self.node.target:
            case aten.addmm.default:
                replaced = {2: weight} if bias is None else {0: bias, 2: weight}
            case _ if bias is not None and self.node.target is not aten.embedding.default:
                replaced[2] = bias
            case aten.embedding.default:
                replaced = {0: weight}
        arguments = list(self.node.args) + [None] * (max(replaced) + 1 - len(self.node.args))
        for place, value in replaced.items():
            arguments[place] = value
        self.node.args = tuple(arguments)

    def base(self, emit: Emit, weight: fx.Node, x: Activation) -> fx.Node:
        """The same operator on another activation, without the bias; `weight` as it is stored."""
        if x == self.x and self.bias is None:
            return self.node
        match x:
            case OneHot(ids, options):
                return emit.call(aten.embedding.default, weight, ids, *options)
            case Dense(node) if self.node.target is QUANTIZED_LINEAR:
                return emit.call(QUANTIZED_LINEAR, node, weight, None)
            case Dense(node):
                kind = weight.meta["val"].dtype
                cast = node if node.meta["val"].dtype == kind else emit.call(aten.to.dtype, node, kind)
                if self.node.target is aten.addmm.default:
                    return emit.call(aten.matmul.default, cast, weight)
                return emit.call(aten.linear.default, cast, weight)


def use_of(node: fx.Node, weight: fx.Node, site: Site) -> WeightUse | Miss:
    """How a node uses the weight."""
    match node.target:
        case OpOverload() as op if op in LINEARS and node.args[1] is weight and site.kind in LINEAR_KINDS:
            bias = node.args[2] if len(node.args) > 2 else None
            return WeightUse(node, Dense(_node(node.args[0])), bias if isinstance(bias, fx.Node) else None)
        case aten.addmm.default if node.args[2] is weight and site.kind == "conv1d" and not node.kwargs:
            return WeightUse(node, Dense(_node(node.args[1])), _node(node.args[0]))
        case aten.embedding.default if node.args[0] is weight and site.kind == "embedding":
            return WeightUse(node, OneHot(_node(node.args[1]), tuple(node.args[2:])))
        case OpOverload() as op if op in CONVOLUTIONS and node.args[1] is weight and site.kernel and not node.kwargs:
            bias = node.args[2] if len(node.args) > 2 else None
            options = tuple(node.args[3:])
            patches = Patches(_node(node.args[0]), op, site.kernel, site.channels, site.groups, options)
            return WeightUse(node, patches, bias if isinstance(bias, fx.Node) else None)
        case _:
            return Miss(f"the weight is used by {node.target}", node)


def _node(argument: object) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument
