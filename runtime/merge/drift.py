"""What merging costs, as plain data. Needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorDrift:
    """How far a merged tensor is from the exact value of its formula, computed in float64.

    `largest` is the largest absolute difference, `relative` that difference in units of the largest exact value.
    """

    name: str
    dtype: str
    largest: float
    relative: float


@dataclass(frozen=True)
class OutputDrift:
    """How far the merged model's outputs are from the unmerged one's, for one call.

    `largest` and `mean` are of the absolute differences, `relative` is `largest` in units of the largest output. Where
    the model has logits, `divergence` is the mean Kullback-Leibler divergence, in nats, of the merged distribution from
    the unmerged one, and `agreement` the share of places where both prefer the same token (or label). Places that an
    attention mask hides do not count for these two.
    """

    largest: float
    mean: float
    relative: float
    divergence: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class MergeDrift:
    """What merging these adapters would cost: tensor by tensor, and in the outputs of a call if there was one."""

    adapters: tuple[str, ...]
    tensors: tuple[TensorDrift, ...]
    outputs: OutputDrift | None = None

    @property
    def largest(self) -> float:
        """The largest absolute difference of any tensor."""
        return max((each.largest for each in self.tensors), default=0.0)

    @property
    def relative(self) -> float:
        """The largest relative difference of any tensor."""
        return max((each.relative for each in self.tensors), default=0.0)
