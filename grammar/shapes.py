"""Symbolic sizes: polynomials with whole coefficients over `in`, `out` and hyperparameters."""

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
    """A matrix type: rows and columns."""

    rows: Dim
    columns: Dim

    def __str__(self) -> str:
        return f"[{self.rows}, {self.columns}]"

    @property
    def transposed(self) -> "Shape":
        """Columns and rows."""
        return Shape(self.columns, self.rows)
