"""Modules that are given something else than rows in their order: never another row's adapter."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import ModelError, UsageError
from tests.stack import Stack

NAMES = ["a", "b", "__base__", "a"]
SPEC = "adapter a = lora(rank = 2) { on fc }\nadapter b = lora(rank = 3) { on fc }\nactivate a"


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.pos = nn.Parameter(torch.randn(1, 16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.fc(x))


class Flat(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.reshape(-1, 8)).view(x.shape)


class Sorted(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 8)
        order = flat[:, 0].argsort()
        return torch.zeros_like(flat).index_copy(0, order, self.fc(flat[order])).view(x.shape)


class Turned(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.transpose(0, 1).reshape(-1, 8)).view(x.shape[1], x.shape[0], 8).transpose(0, 1)


class Doubled(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.fc(torch.cat([x, 2 * x])).chunk(2)
        return one + two


class Backwards(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flip(0)).flip(0)


class Halves(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[0] // 2
        return torch.cat([self.fc(x[:half]), self.fc(x[half:])])


class Chosen(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 8)
        (places,) = torch.where(flat[:, 0] > 0)
        return flat.index_add(0, places, self.fc(flat[places])).view(x.shape)


class Learned(Plain):
    """What is adapted is no activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(self.pos[:, : x.shape[1]])


RIGHT: tuple[type[Plain], ...] = ()


def made(kind: type[Plain]) -> Any:
    torch.manual_seed(0)
    model = compiler.apply(Stack(kind() for _ in range(2)).eval(), SPEC)
    with torch.no_grad():
        for each in model.adapter_bank.parameters():
            each.add_(torch.randn_like(each) * 0.3)
    return model


def alone(model: Any, x: torch.Tensor) -> torch.Tensor:
    rows = []
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(x[row : row + 1]))
        else:
            model.set_adapter(name)
            rows.append(model(x[row : row + 1]))
    return torch.cat(rows)


@pytest.mark.parametrize("length", [1, 3, 4])
@pytest.mark.parametrize("kind", [Plain, Flat])
@torch.no_grad()
def test_rows_in_their_order(kind: type[Plain], length: int) -> None:
    model, x = made(kind), torch.randn(4, length, 8)
    assert_close(model(x, adapter_names=NAMES), alone(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("kind", [Sorted, Turned, Doubled, Backwards, Halves, Chosen, Learned])
@torch.no_grad()
def test_another_order_is_right_or_refused(kind: type[Plain], length: int) -> None:
    model, x = made(kind), torch.randn(4, length, 8)
    if kind in RIGHT:
        assert_close(model(x, adapter_names=NAMES), alone(model, x), atol=1e-5, rtol=1e-5)
    else:
        with pytest.raises((ModelError, UsageError), match=r"E425|E465|E529"):
            model(x, adapter_names=NAMES)
