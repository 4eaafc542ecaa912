"""A site: a weight of the model that an adapter can reach."""

import math
from dataclasses import dataclass

import torch

from peftc.passes.quantized.schemes.packing import Packing

WHOLE = ("prompt", "cache")  # places of which a model has one
HELD = ("parameter", "multihead_attention")  # kinds of weight that a module holds under a name of their own


@dataclass(frozen=True)
class Site:
    """One weight as one module uses it. A tied weight is one site per module that uses it.

    `out_features` and `in_features` describe the logical `W` of shape `[out, in]` (`[count, out, in]` for a stack of
    experts), whatever the module stores: an Embedding of V rows of width d is `out = d`, `in = V`; a convolution stores
    `[out, channels, *kernel]` (each group's own input channels), and its `in` is the channels times the kernel's size.
    """

    module: str  # "model.layers.0.self_attn.q_proj"
    leaf: str  # "weight"
    kind: str  # one of peftc.grammar.method.rule.KINDS, or of PLACES: then there may be no weight
    out_features: int
    in_features: int
    count: int = 1  # experts stacked in one parameter
    transposed: bool = False  # stored as [.., in, out]
    kernel: tuple[int, ...] = ()  # of a convolution
    groups: int = 1  # of a convolution
    attention: str | None = None  # the MultiheadAttention it is a projection of, which uses it in its own forward
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    tied: tuple[str, ...] = ()  # other names of the same tensor
    has_bias: bool = False
    output: bool = False  # the model's output layer, which "all linear" leaves out
    layers: int = 0  # of the model, and how many heads of keys each has: of a place that is no weight
    heads: int = 0
    scale: float = 1.0  # what the module multiplies the rows of an embedding by: `W` has what it returns
    packing: Packing | None = None  # how the module stores it, where a quantization library does
    stacks: int = 1  # two where an encoder stands beside a decoder

    @property
    def name(self) -> str:
        """How selectors call it: the module, or module.parameter where the module holds more than one weight."""
        if self.kind in WHOLE:
            return f"@{self.kind}"  # no module is called so
        return f"{self.module}.{self.leaf}".lstrip(".") if self.kind in HELD else self.module

    @property
    def user(self) -> str:
        """The module in whose forward the weight is used."""
        return self.module if self.attention is None else self.attention

    @property
    def channels(self) -> int:
        """The input channels a convolution's output sees: those of its group."""
        return self.in_features // math.prod(self.kernel)

    @property
    def lead(self) -> int:
        """How many axes the values of expressions have in front of their own: one at a stack of experts."""
        return int(self.count > 1)

    @property
    def bias(self) -> str:
        """The full name of the bias beside the weight, if the module has one."""
        leaf = "in_proj_bias" if self.leaf == "in_proj_weight" else "bias"
        return f"{self.module}.{leaf}".lstrip(".")

    @property
    def weight(self) -> str:
        """The full name of the parameter, `model.layers.0.self_attn.q_proj.weight`."""
        return f"{self.module}.{self.leaf}".lstrip(".")


def category(name: str) -> str:
    """What a site is in its block, as PEFT tells sites of one kind apart: `self_attn_q_proj`, `attention_output`."""
    parts = name.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:  # not to be one with the output of the MLP
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"
