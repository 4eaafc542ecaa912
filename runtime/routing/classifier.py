"""The classifier of X-LoRA (https://huggingface.co/papers/2402.07148): a route that is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Scalings = torch.Tensor
"""`[rows, tokens, places, adapters]`, before the largest are chosen."""


@dataclass
class ClassifierSettings:
    """What a classifier computes; `peftc.passes.foreign.peft_routes` has PEFT's names of these.

    `hidden_size` is the base's. It has `depth` linear layers, those between of `size` features and with `dropout` after
    each. It gives one number for each adapter, with `by_place` another one at each adapted place. With `softmax` these
    are divided by `temperature` and add up to one. Of all only the `top_k` largest are kept, with `softmax_top_k` so
    that they add up to one. All are multiplied by `weight`. `first_pass` is what every adapter is given of in the pass
    for the hidden states.
    """

    hidden_size: int = 4096
    depth: int = 1
    size: int = 2048
    dropout: float = 0.2
    by_place: bool = False
    softmax: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    softmax_top_k: bool = False
    weight: float = 1.0
    first_pass: float = 0.0
    trains_adapters: bool = False


class ScalingClassifier(nn.Module):
    """Gives how much of each adapter a token is given, from its hidden state."""

    def __init__(self, settings: ClassifierSettings, adapters: int, places: int):
        super().__init__()
        self.settings, self.adapters, self.places = settings, adapters, places
        self.sources: Mapping[str, str] = {}  # where the adapters were, by name, when it was made
        layers: list[nn.Module] = []
        width = settings.hidden_size
        for _ in range(settings.depth - 1):
            layers += [nn.Linear(width, settings.size), nn.ReLU()]
            layers += [nn.Dropout(settings.dropout)] if settings.dropout > 0 else []
            width = settings.size
        self.layers = nn.Sequential(*layers, nn.Linear(width, adapters * (places if settings.by_place else 1)))
        self._latest: Scalings | None = None
        self._log: list[Scalings] | None = None
        self._kept: list[Scalings] = []

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Of `[rows, tokens, hidden]` the numbers `[rows, tokens, adapters]`, by place with one more axis before."""
        found = self.layers(hidden_states)
        if self.settings.by_place:
            found = found.unflatten(-1, (self.places, self.adapters))
        if self.settings.softmax:
            found = torch.softmax(found / self.settings.temperature, dim=-1)
        self._latest = found if self.settings.by_place else found.unsqueeze(2).expand(-1, -1, self.places, -1)
        if self._log is not None:
            self._log.append(self._latest)
        return self._chosen(found)

    def first_pass(self, rows: int) -> torch.Tensor | None:
        """What every adapter is given of in the pass for the hidden states, `[rows, adapters]`; None for nothing."""
        if not self.settings.first_pass:
            return None
        like = next(self.parameters())
        return self._chosen(like.new_full((rows, self.adapters), self.settings.first_pass))

    def _chosen(self, scalings: torch.Tensor) -> torch.Tensor:
        if self.settings.top_k is not None:
            largest = torch.topk(scalings, self.settings.top_k, dim=-1).indices
            scalings = scalings * torch.zeros_like(scalings).scatter(-1, largest, 1.0)
        if self.settings.softmax_top_k:
            left = scalings != 0
            shares = torch.softmax(scalings.masked_fill(~left, float("-inf")), dim=-1)
            scalings = shares.masked_fill(~left, 0.0)
        return scalings * self.settings.weight

    def __getstate__(self) -> dict[str, Any]:
        """Without what calls were given, which is theirs."""
        return self.__dict__ | {"_latest": None, "_log": None, "_kept": []}

    # --- what it gave, as PEFT's methods of these names ---

    def get_latest_scalings(self) -> Scalings | None:
        """What the last call was given, before the largest are chosen; None before the first."""
        return self._latest

    def enable_scalings_logging(self) -> None:
        """Keep what every call from now on is given."""
        self._log = self._kept

    def disable_scalings_logging(self) -> None:
        """Keep no more; what was kept stays until `clear_scalings_log`."""
        self._log = None

    def clear_scalings_log(self) -> None:
        """Forget what was kept."""
        self._kept.clear()

    def get_scalings_log(self) -> list[Scalings]:
        """A copy of the list of what was kept."""
        return list(self._kept)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Scalings]]]:
        """What was kept, by how many tokens it has: its places in the log, and itself."""
        found: dict[int, tuple[list[int], list[Scalings]]] = {}
        for place, each in enumerate(self._kept):
            places, kept = found.setdefault(each.shape[1], ([], []))
            places.append(place)
            kept.append(each)
        return found

    def set_top_k(self, value: int | None) -> None:
        """Keep this many of the largest numbers from now on; None: all."""
        self.settings.top_k = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Multiply what every adapter adds by this from now on."""
        self.settings.weight = weight

    def get_global_scaling_weight(self) -> float:
        """What everything is multiplied by."""
        return self.settings.weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Give each adapter this much in the pass for the hidden states; None: all the same, and one together."""
        self.settings.first_pass = 1 / self.adapters if value is None else value
