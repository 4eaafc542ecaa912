"""What `bench` measured. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Calls of one entry at one size. `sizes` are the dimensions; `milliseconds` the median of `calls`."""

    entry: str
    sizes: Mapping[str, int]
    tokens: int
    milliseconds: float
    calls: int

    @property
    def tokens_per_second(self) -> float:
        """How many tokens (where there are none: rows) of all rows go through in a second."""
        return self.tokens / self.milliseconds * 1000


@dataclass(frozen=True)
class BenchFacts:
    """What was measured, of which artifact, on how many threads."""

    artifact: str
    backend: str
    adapters: str
    threads: int
    timings: tuple[Timing, ...]
