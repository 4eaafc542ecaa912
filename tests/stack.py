"""The smallest model with repeated layers."""

from collections.abc import Iterable

import torch
from torch import nn


class Stack(nn.Module):
    """Layers, each given what the one before it gives."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
