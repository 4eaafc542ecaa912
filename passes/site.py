"""A site: a weight of the model that an adapter can reach."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Site:
    """One weight as one module uses it. A tied weight is one site per module that uses it.

    `out_features` and `in_features` describe the logical `W` of shape `[out, in]` (`[count, out, in]` for a stack of
    experts), whatever the module stores: an Embedding of V rows of width d is `out = d`, `in = V`.
    """

    module: str  # "model.layers.0.self_attn.q_proj"
    leaf: str  # "weight"
    kind: str  # one of peftc.grammar.rule.KINDS
    out_features: int
    in_features: int
    count: int = 1  # experts stacked in one parameter
    transposed: bool = False  # stored as [.., in, out]
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    tied: tuple[str, ...] = ()  # other names of the same tensor
    output: bool = False  # the model's output layer, which "all linear" leaves out

    @property
    def name(self) -> str:
        """How selectors and PEFT call it: the module, or module.parameter for a raw parameter."""
        return f"{self.module}.{self.leaf}".lstrip(".") if self.kind == "parameter" else self.module

    @property
    def weight(self) -> str:
        """The full name of the parameter, `model.layers.0.self_attn.q_proj.weight`."""
        return f"{self.module}.{self.leaf}".lstrip(".")
