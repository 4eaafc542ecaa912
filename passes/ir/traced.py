"""What a trace leaves behind: one flat graph, and how to call it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from peftc.passes.ir.inputs import InputSpec


@dataclass(frozen=True)
class Traced:
    """A base graph and its calling convention.

    `graph` takes one placeholder for each of `inputs`, which say what they are for and how long, and returns a flat
    tuple of tensors; weights are `get_attr` nodes of their own names, one node per module that uses them. Tensors the
    trace made itself are in `constants`. `guards` are Python expressions over `sizes[input][axis]`: what the model's
    own code asked of its sizes while it was traced, all of it true. The last `cached` outputs are keys and values;
    `filler` is a token that is not the padding's, of a model of text. `outputs` and `cache` belong to whoever traced:
    how to rebuild the model's output from the flat tuple. Layers in `stamped` were not traced: their nodes are those of
    another layer, alike, with tensors of their own. `alone` says of other repeated layers why they were traced.
    `gradients` is whether the calls keep gradients that the graph is for, None where the forward did not ask;
    `own_backward` names what has a backward of its own there, which no graph has: it is not for calls that keep any.
    """

    graph: fx.Graph
    inputs: tuple[InputSpec, ...]
    constants: Mapping[str, torch.Tensor | nn.Module]
    outputs: object
    cache: object
    guards: tuple[str, ...] = ()
    cached: int = 0
    encoder_decoder: bool = False
    filler: int = 0
    stamped: Mapping[str, str] = field(default_factory=dict)
    alone: Mapping[str, str] = field(default_factory=dict)
    gradients: bool | None = None
    own_backward: str = ""

    @property
    def shapes(self) -> tuple[tuple[int | None, ...], ...]:
        """For each input the sizes that the trace is bound to, with None where any size will do."""
        return tuple(spec.bound for spec in self.inputs)
