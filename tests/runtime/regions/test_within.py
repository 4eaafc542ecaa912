"""A module that is trained as a whole, and regions that begin inside of it."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.dense(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = Head()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in self.blocks:
            x = each(x)
        return self.head(x)


SPECS = {
    "a head outside of the layers": "on blocks[*].up train head",
    "layers": "on head.out train blocks[0], blocks[1]",
    "one of two layers": "on up train blocks[1]",
    "a list of layers": "on head.out train blocks",
}


@pytest.mark.parametrize("regions", ["layers", "modules", "model"])
@pytest.mark.parametrize("case", SPECS)
def test_what_is_trained_as_a_whole_is_used_inside(case: str, regions: Any) -> None:
    base = Net().eval()
    spec = f"adapter a = lora(rank = 2) {{ {SPECS[case]} }}"
    adapted = compiler.apply(base, spec, regions=regions).eval()
    with torch.no_grad():
        for each in adapted.parameters():
            if each.requires_grad:
                each.add_(torch.randn(each.shape) * 0.3)
    x = torch.randn(4, 6)
    want: Any = Net().eval()
    want.load_state_dict(adapted.merge_and_unload().state_dict())
    assert_close(adapted(x), want(x), atol=1e-6, rtol=1e-5)
    assert (adapted(x) - base(x)).abs().max() > 0.1
    adapted(x).sum().backward()
    assert all(each.grad is not None for each in adapted.parameters() if each.requires_grad)
