"""Ways to make one adapter of several, and their settings. The ways, and what all of it is called, are PEFT's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from peftc.grammar.diagnostics import did_you_mean

JOINED = "cat"
DENSE = "svd"
SUM = "linear"
MAJORITIES = ("total", "frequency")
DRIVERS = ("gesvd", "gesvdj", "gesvda")


@dataclass(frozen=True)
class Mix:
    """How tensors become one: which of their numbers are dropped first, and whether what is left votes on signs."""

    dropped: Literal["", "smallest", "random"] = ""
    votes: bool = False


# Of factors, or with "_svd" behind the name of whole updates, whose largest singular values are kept.
_MIXES: Mapping[str, Mix] = {
    SUM: Mix(),
    "ties": Mix("smallest", votes=True),
    "dare_linear": Mix("random"),
    "dare_ties": Mix("random", votes=True),
    "magnitude_prune": Mix("smallest"),
}
KINDS = (*_MIXES, JOINED, DENSE, *(f"{each}_svd" for each in _MIXES if each != SUM))


@dataclass(frozen=True)
class Fault:
    """What is wrong with a setting, by PEFT's name; "" for one that is missing, which the message then names."""

    setting: str
    message: str
    help: str = ""


@dataclass(frozen=True)
class Recipe:
    """A way to combine, and its settings, as `AdaptedModel.add_weighted_adapter` has them."""

    kind: str = DENSE
    density: float | None = None
    majority: str = "total"
    rank: int | None = None
    clamp: float | None = None
    driver: str | None = None

    @property
    def is_known(self) -> bool:
        """Whether there is such a way."""
        return self.kind in KINDS

    @property
    def is_dense(self) -> bool:
        """Whether whole updates are combined, and taken apart again."""
        return self.kind.endswith(DENSE)

    @property
    def mix(self) -> Mix:
        """What is done number by number."""
        return _MIXES.get(self.kind.removesuffix("_svd"), _MIXES[SUM])

    def fault(self) -> Fault | None:
        """The first setting that is missing, or that means nothing whatever the adapters are."""
        wrong = (
            ("majority_sign_method", self.majority, self.majority in MAJORITIES, "'total' or 'frequency'"),
            ("svd_rank", self.rank, _or_none(self.rank, _is_rank), "a whole number from 1 on"),
            ("svd_clamp", self.clamp, _or_none(self.clamp, _is_share), "a quantile, from 0 to 1"),
            ("svd_driver", self.driver, _or_none(self.driver, DRIVERS.__contains__), f"one of {', '.join(DRIVERS)}"),
        )
        told = (Fault(name, f"{name} = {value!r} is not {wanted}") for name, value, fits, wanted in wrong if not fits)
        return (self._density_fault() if self.mix.dropped else None) or next(told, None)

    def unread(self) -> tuple[str, ...]:
        """The settings that were given, by PEFT's names, and that this way does not read."""
        given = {
            "density": self.density is not None,
            "majority_sign_method": self.majority != "total",
            "svd_rank": self.rank is not None,
            "svd_clamp": self.clamp is not None,
            "svd_driver": self.driver is not None,
        }
        return tuple(name for name, is_given in given.items() if is_given and not self.reads(name))

    def reads(self, setting: str) -> bool:
        """Whether a setting, by PEFT's name, is one of this way's."""
        match setting:
            case "density":
                return bool(self.mix.dropped)
            case "majority_sign_method":
                return self.mix.votes
            case _:
                return self.is_dense

    def _density_fault(self) -> Fault | None:
        if self.density is None:
            message = f"{self.kind!r} drops a share of the numbers, and which is not said"
            return Fault("", message, "give density, the share that is kept, such as 0.5")
        if not (_is_number(self.density) and self.density >= 0):
            return Fault("density", f"density = {self.density!r} is not the share of numbers that is kept, from 0 to 1")
        if self.density == 0 and self.mix.dropped == "random":
            wanted = "more than 0 where what is kept is enlarged in proportion"
            return Fault("density", f"density = {self.density!r} is not {wanted}")
        return None


def like_kind(word: str) -> str:
    """A help line with the ways that are called nearly so, or all of them."""
    return did_you_mean(word, KINDS) or f"it is one of {', '.join(KINDS)}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _or_none(value: object, fits: Callable[[object], bool]) -> bool:
    return value is None or fits(value)
