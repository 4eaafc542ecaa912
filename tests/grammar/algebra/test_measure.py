"""The sizes of closed forms in numbers."""

import pytest

from peftc.grammar.algebra import algebra as al
from peftc.grammar.algebra.functions import MisfitError
from peftc.grammar.algebra.measure import largest_part, sizes_of

A, B, V = al.Param("A"), al.Param("B"), al.Param("V")
ROLES = {"A": (2, 6), "B": (4, 2), "V": (6,)}
W = al.Weight()


@pytest.mark.parametrize(
    ("matrix", "sizes"),
    [
        (W, (4, 6)),
        (al.Bias(), (4,)),
        (al.Product(B, A), (4, 6)),
        (al.Sum(W, al.Dropped(al.Scaled("s", al.Product(B, A)), 0.5)), (4, 6)),
        (al.Hadamard(W, V), (4, 6)),
        (al.Transposed(W), (6, 4)),
        (al.Function("divide", (W, V)), (4, 6)),
        (al.Function("reciprocal", (V,)), (6,)),
        (al.Function("shift", (V,), (1.0,)), (6,)),
        (al.Function("norm", (W,), (1,)), (4, 1)),
        (al.Function("reshape", (W,), ((2, 2, 6),)), (2, 2, 6)),
        (al.Function("clamp", (W,), (0.5, 1.0)), (4, 6)),
        (al.Function("eye", (), (3,)), (3, 3)),
    ],
)
def test_sizes(matrix, sizes):
    assert sizes_of(matrix, ROLES, (4, 6)) == sizes


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (al.Product(A, B), "'@' needs as many columns on its left as rows on its right: A is [2, 6], B is [4, 2]"),
        (al.Sum(A, W), "elementwise operators need equal sizes: A is [2, 6], W is [4, 6]"),
        (al.Function("reshape", (W,), ((5, 5),)), "24 numbers do not make 25: W is [4, 6]"),
        (al.Transposed(V), "'.T' swaps the last two axes, and there is one: V is [6]"),
        (al.Sum(W, al.Product(A, al.Transposed(V))), "'.T' swaps the last two axes, and there is one: V is [6]"),
    ],
)
def test_the_part_that_does_not_fit_is_named(matrix, message):
    with pytest.raises(MisfitError) as caught:
        sizes_of(matrix, ROLES, (4, 6))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("matrix", "largest"),
    [
        (W, 24),
        (al.Product(B, A), 24),
        (al.Product(A, al.Transposed(A)), 12),
        (al.Function("mean", (al.Function("tile", (W,), ((10, 3),)),), (0,)), 720),
    ],
)
def test_the_largest_part(matrix, largest):
    assert largest_part(matrix, ROLES, (4, 6)) == largest
