"""Adapters for any torch module: a small classifier, no transformers, the spec in the program.

    python examples/plain_module.py

The base has learnt to tell rings from a blob; the adapter teaches it to tell one half of the plane from the other.
"""

import sys

import torch
from torch import nn

from peftc import compiler

SPEC = """
adapter halves = lora(rank = 2, alpha = 4) {
    on    layers[*]
    train head
}
"""


class Classifier(nn.Module):
    """Points of the plane to two classes."""

    def __init__(self, width: int = 32, depth: int = 3):
        super().__init__()
        self.embed = nn.Linear(2, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 2)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """`[batch, 2]` to logits `[batch, 2]`."""
        hidden = self.embed(points).tanh()
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        return self.head(hidden)


def main() -> None:
    torch.set_num_threads(1)  # so small a model gains nothing from more
    torch.manual_seed(0)
    points = torch.randn(512, 2)
    rings = (points.norm(dim=1) > 1.2).long()
    halves = (points[:, 0] > points[:, 1]).long()

    model = Classifier()
    fit(model, points, rings, rate=1e-2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    print(f"base      rings {accuracy(model, points, rings):.2f}   halves {accuracy(model, points, halves):.2f}")

    # The example input is traced at once, and errors come now; without it the first call is traced.
    adapted = compiler.apply(model, SPEC, example_inputs=(points[:4],))
    trained, total = adapted.get_nb_trainable_parameters()
    print(f"adapter   {trained} of {total} parameters are trained")
    fit(adapted, points, halves, rate=1e-2)
    print(f"adapted   rings {accuracy(adapted, points, rings):.2f}   halves {accuracy(adapted, points, halves):.2f}")

    with adapted.disable_adapter():
        print(f"disabled  rings {accuracy(adapted, points, rings):.2f}   the base is still there")
    merged = adapted.merge_and_unload()
    difference = float((merged(points) - adapted(points)).detach().abs().max())
    print(f"merged    a {type(merged).__name__}, largest difference {difference:.1e}")

    if difference > 1e-4 or accuracy(merged, points, halves) < 0.9:
        sys.exit("the merged model is not what was trained")
    if not all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()):
        sys.exit("the base was changed")


def fit(model: nn.Module, points: torch.Tensor, classes: torch.Tensor, rate: float, steps: int = 150) -> None:
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=rate)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(points), classes).backward()
        optimizer.step()
    model.eval()


def accuracy(model: nn.Module, points: torch.Tensor, classes: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(points).argmax(dim=1) == classes).float().mean())


if __name__ == "__main__":
    main()
