"""A token drawn from logits, as transformers draws it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftc.grammar.diagnostics import UsageError, fail


@dataclass(frozen=True)
class Sampling:
    """Draw from the distribution made sharper by a low temperature and cut to its most probable part.

    Raises:
        UsageError: `temperature` is not above 0, `top_k` not at least 1 or `top_p` not in 0 to 1 (E623).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    generator: torch.Generator = field(default_factory=torch.Generator, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            fail(UsageError, "E623", f"temperature is {self.temperature:g}, it has to be above 0")
        if self.top_k is not None and self.top_k < 1:
            fail(UsageError, "E623", f"top_k is {self.top_k}, it has to be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            fail(UsageError, "E623", f"top_p is {self.top_p:g}, it has to be above 0 and at most 1")
        if self.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.seed)

    def draw(self, logits: Tensor) -> Tensor:
        """Of logits [batch, vocabulary] one token a row, [batch]."""
        return torch.multinomial(self.kept(logits).softmax(-1), 1, generator=self.generator)[:, 0]

    def kept(self, logits: Tensor) -> Tensor:
        """The logits after temperature, `top_k` and `top_p`; minus infinity where a token is left out."""
        scores = logits.float() / self.temperature
        if self.top_k is not None:
            least = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        if self.top_p is not None and self.top_p < 1:
            ordered, order = scores.sort(descending=False)
            out = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            out[:, -1] = False  # one token stays, however small top_p is
            scores = scores.masked_fill(out.scatter(1, order, out), float("-inf"))
        return scores
