"""Symbolic sizes: polynomials with whole coefficients over `in`, `out` and hyperparameters."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

Monomial = tuple[str, ...]


@dataclass(frozen=True)
class Dim:
    """A size in normal form, so that equal sizes are equal values: `rank + rank == 2 * rank`.

    What the normal form does not understand (`in // rank`) is an atom of its own, equal only to itself.
    """

    terms: tuple[tuple[Monomial, int], ...]

    @staticmethod
    def atom(name: str) -> "Dim":
        """A size known by name."""
        return Dim((((name,), 1),))

    @staticmethod
    def constant(value: int) -> "Dim":
        """A size known by number."""
        return _normal({(): value})

    @property
    def value(self) -> int | None:
        """The number, if it is one."""
        match self.terms:
            case ():
                return 0
            case (((), number),):
                return number
            case _:
                return None

    @property
    def is_open(self) -> bool:
        """Whether it holds a part that only values decide: a quotient, a minimum, a condition."""
        return any("(" in atom for monomial, _ in self.terms for atom in monomial)

    def __add__(self, other: "Dim") -> "Dim":
        terms = dict(self.terms)
        for monomial, factor in other.terms:
            terms[monomial] = terms.get(monomial, 0) + factor
        return _normal(terms)

    def __neg__(self) -> "Dim":
        return Dim(tuple((monomial, -factor) for monomial, factor in self.terms))

    def __mul__(self, other: "Dim") -> "Dim":
        terms: dict[Monomial, int] = {}
        for left, first in self.terms:
            for right, second in other.terms:
                monomial = tuple(sorted(left + right))
                terms[monomial] = terms.get(monomial, 0) + first * second
        return _normal(terms)

    def __str__(self) -> str:
        parts: list[str] = []
        for monomial, factor in reversed(self.terms):
            size = [str(abs(factor))] if abs(factor) != 1 or not monomial else []
            sign = "-" if factor < 0 else "+"
            parts.append(f"{sign} {' * '.join([*size, *monomial])}")
        return " ".join(parts).removeprefix("+ ") or "0"


def _normal(terms: dict[Monomial, int]) -> Dim:
    return Dim(tuple(sorted((monomial, factor) for monomial, factor in terms.items() if factor)))


@dataclass(frozen=True)
class Shape:
    """A tensor type: one to four sizes."""

    sizes: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.sizes))}]"


def differ(left: Dim, right: Dim) -> bool:
    """Whether two sizes are known to be unequal. What only a site can tell (`in // block * block` and `in`) is not."""
    return left != right and not left.is_open and not right.is_open


def product(sizes: Iterable[Dim]) -> Dim:
    """How many numbers a tensor of these sizes holds."""
    return functools.reduce(Dim.__mul__, sizes, Dim.constant(1))
