"""What every function of tensors takes and gives, in names when a method is defined and in numbers at a site."""

import pytest

from peftc.grammar.algebra.functions import FUNCTIONS, MAX_AXES, MisfitError, broadcast, matmul, result, transposed
from peftc.grammar.algebra.shapes import Dim, Shape
from peftc.grammar.diagnostics import SpecError
from peftc.grammar.method.infer import Scalar, type_of
from peftc.grammar.source import Source
from peftc.grammar.syntax.parse import parse

TRIANGLE = "(-rank + rank * rank) // (2)"
TENSORS = {
    "A": ("rank", "in"),
    "B": ("out", "rank"),
    "S": ("rank", "rank"),
    "v": ("in",),
    "r": ("rank",),
    "t": ("n", TRIANGLE),
    "X": ("n", "rank", "k"),
    "Y": ("n", "k", "rank", "in"),
    "I": ("k",),
    "P": ("2", "rank"),
}
NAMES = {
    **{name: Scalar("int", dim=Dim.atom(name)) for name in ("in", "out", "rank", "n", "k")},
    **{
        name: Shape(tuple(Dim.constant(2) if each == "2" else Dim.atom(each) for each in sizes))
        for name, sizes in TENSORS.items()
    },
    "alpha": Scalar("float"),
    "mode": Scalar("text"),
}


def typed(text):
    (method,) = parse(Source("x", f"method m() {{ on linear let it = {text} }}")).statements
    return type_of(method.items[-1].value, NAMES)


GOOD = {
    "block_diag(X)": "[n * rank, k * n]",
    "blocks(Y)": "[n * rank, in * k]",
    "choose(r, S, -1)": "[rank, rank]",
    "circulant(A)": "[rank, in, in]",
    "common_basis(X, alpha)": "[k, k]",
    "concat(A, S @ A, 0)": "[2 * rank, in]",
    "concat(r, r, 0)": "[2 * rank]",
    "count(A, in)": "[in]",
    "cycle(r, in, 0)": "[in]",
    "cycle(A, out, 0)": "[out, in]",
    "diag(v)": "[in, in]",
    "coins(out, 0.5)": "[out]",
    "thinned(rank, 2)": "[rank]",
    "task(rank)": "[1]",
    "eye(2 * rank)": "[2 * rank, 2 * rank]",
    "gather(A, I)": "[k, in]",
    "gather(X, S)": "[rank, rank, rank, k]",
    "kron(A, B)": "[out * rank, in * rank]",
    "largest(A, 3)": "[3]",
    "left_singular(B, 4)": "[out, 4]",
    "mean(X, 2)": "[n, rank, 1]",
    "norm(A, 1)": "[rank, 1]",
    "permute(X, [2, 0, 1])": "[k, n, rank]",
    "range_basis(B, S, 2)": "[out, rank]",
    "reshape(A, [in, rank])": "[in, rank]",
    "reshape(X, [n * k * rank])": "[k * n * rank]",
    "right_singular(B, 4)": "[4, rank]",
    "scatter(r, r, [out, in])": "[out, in]",
    "scatter(r, P, [out, in])": "[out, in]",
    "singular_values(B, n)": "[n]",
    "skew(t, rank)": "[n, rank, rank]",
    "slice(A, 1, 2, 2 + n)": "[rank, n]",
    "solve(S, A)": "[rank, in]",
    "std(X, 0)": "[1, rank, k]",
    "sum(v, 0)": "[1]",
    "tile(A, [n, 2])": "[n * rank, 2 * in]",
}
SAME = {
    **{f"{name}(X)": "X" for name in ("abs", "cos", "exp", "gelu", "relu", "sigmoid", "sign", "silu", "sin", "sqrt")},
    **{f"{name}(A)": "A" for name in ("stop_gradient", "tanh", "softmax", "ifft2", "qr")},
    **{f"{name}(S)": "S" for name in ("cayley", "expm", "inverse")},
    'activation(A, "silu")': "A",
    "activation(A, mode)": "A",
    "clamp(A, -alpha, 1)": "A",
    "equal(A, 3)": "A",
    "remainder(A, rank)": "A",
    "rounded(X, 8)": "X",
    'inverse_wavelet(A, "db2")': "A",
    "neumann(S, 5)": "S",
    "noisy(X)": "X",
    "roll(X, rank, 1)": "X",
    "topk(A, rank)": "A",
    "triu(A, 1)": "A",
}


@pytest.mark.parametrize(("text", "shape"), GOOD.items())
def test_shapes(text, shape):
    assert str(typed(text)) == shape


@pytest.mark.parametrize(("text", "operand"), SAME.items())
def test_shapes_that_stay(text, operand):
    assert typed(text) == NAMES[operand]


def test_every_function_has_an_example():
    assert {text.partition("(")[0] for text in (*GOOD, *SAME)} == set(FUNCTIONS)


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("block_diag(A)", "E133", "'block_diag' takes 3 axes, and this has 2: A is [rank, in]"),
        ("blocks(X)", "E133", "'blocks' takes 4 axes, and this has 3: X is [n, rank, k]"),
        ("choose(A, B, 0)", "E133", "elementwise operators need equal sizes: A is [rank, in], B is [out, rank]"),
        ("remainder(A, 0)", "E133", "a divisor is at least 1, not 0: A is [rank, in]"),
        ("equal(A, alpha)", "E132", "'number' of 'equal' is a whole number, and 'alpha' is a number"),
        ("circulant(Y)", "E133", "a tensor has at most 4 axes: Y is [n, k, rank, in]"),
        ("concat(A, B, 0)", "E133", "'concat' needs equal sizes along the other axes: A is [rank, in], B is [out, ra"),
        ("concat(A, v, 0)", "E133", "'concat' needs equal sizes along the other axes: A is [rank, in], v is [in]"),
        ("cycle(A, 5, 2)", "E133", "the axis is one of 0, 1: A is [rank, in]"),
        ("common_basis(A, 1)", "E133", "'common_basis' takes 3 axes, and this has 2: A is [rank, in]"),
        ("solve(A, A)", "E133", "the last two axes must be of one size: A is [rank, in], A is [rank, in]"),
        ("diag(A)", "E133", "'diag' takes 1 axis, and this has 2: A is [rank, in]"),
        ("kron(A, v)", "E133", "'kron' takes 2 axes, and this has 1: A is [rank, in], v is [in]"),
        ("norm(A, rank)", "E133", "the axis is one of 0, 1: A is [rank, in]"),
        ("mean(v, 1)", "E133", "the axis is one of 0: v is [in]"),
        ("permute(X, [0, 1])", "E133", "a permutation of 3 axes names each once: X is [n, rank, k]"),
        ("permute(A, [1, 1])", "E133", "a permutation of 2 axes names each once: A is [rank, in]"),
        ("reshape(A, [in])", "E133", "in * rank numbers do not make in: A is [rank, in]"),
        ("roll(A, 1, 7)", "E133", "the axis is one of 0, 1: A is [rank, in]"),
        ("scatter(v, r, [out])", "E133", "'scatter' takes one number for each index: v is [in], r is [rank]"),
        ("scatter(A, r, [out])", "E133", "'scatter' takes one number for each index: A is [rank, in], r is [rank]"),
        ("scatter(r, P, [out])", "E133", "a place of a tensor of 1 axes has 1 coordinates: r is [rank], P is [2, ra"),
        ("skew(v, rank)", "E133", "a skew matrix of size rank has rank * (rank - 1) / 2 numbers, and here are in"),
        ("slice(diag(r), 0, 3, 2)", "E133", "3 to 2 is no part of an axis: diag(r) is [rank, rank]"),
        ("slice(eye(4), 0, 2, 5)", "E133", "2 to 5 is not inside an axis of size 4: eye(4) is [4, 4]"),
        ("tile(A, [2])", "E133", "'tile' takes one count for each of 2 axes: A is [rank, in]"),
        ("topk(eye(3), 4)", "E133", "'topk' of 3 numbers keeps 1 to 3, not 4: eye(3) is [3, 3]"),
        ("triu(v, 0)", "E133", "a triangle is part of a matrix, and there is one axis: v is [in]"),
        ("left_singular(v, 2)", "E133", "a singular value decomposition takes 2 axes, and this has 1: v is [in]"),
        ("right_singular(X, 2)", "E133", "a singular value decomposition takes 2 axes, and this has 3: X is [n, ra"),
        ("singular_values(v, 1)", "E133", "a singular value decomposition takes 2 axes, and this has 1: v is [in]"),
        ("singular_values(eye(3), 4)", "E133", "a matrix of 3 x 3 has 3 singular values, not 4: eye(3) is [3, 3]"),
        ("inverse(A)", "E133", "the last two axes must be of one size: A is [rank, in]"),
        ("cayley(v)", "E133", "the last two axes must be of one size: v is [in]"),
        ("expm(B)", "E133", "the last two axes must be of one size: B is [out, rank]"),
        ("neumann(A, 2)", "E133", "the last two axes must be of one size: A is [rank, in]"),
        ("neumann(S, 0)", "E133", "a series has 1 to 1000 terms, not 0: S is [rank, rank]"),
        ("neumann(S, 1001)", "E133", "a series has 1 to 1000 terms, not 1001: S is [rank, rank]"),
        ("range_basis(S, S, 1001)", "E133", "an iteration has 0 to 1000 rounds, not 1001: S is [rank, rank]"),
        ("qr(v)", "E133", "the last two axes are a matrix, and there is one axis: v is [in]"),
        ("qr(reshape(eye(4), [2, 8]))", "E133", "8 columns of 2 numbers cannot all be orthogonal: reshape(eye(4), [2"),
        (
            "range_basis(B, B, 2)",
            "E133",
            "'@' needs as many columns on its left as rows on its right: B is [out, rank], ",
        ),
        ("range_basis(eye(2), reshape(eye(4), [2, 8]), 2)", "E133", "8 columns of 2 numbers cannot all be orthogonal"),
        ("ifft2(v)", "E133", "the last two axes are a matrix, and there is one axis: v is [in]"),
        ("eye(rank - rank)", "E133", "a size is at least 1, not 0: eye(rank - rank)"),
        ("tile(A, [1, 0])", "E133", "a size is at least 1, not 0: A is [rank, in]"),
        ("largest(eye(2), 5)", "E133", "of 4 numbers 1 to 4 can be the largest, not 5: eye(2) is [2, 2]"),
        ('activation(A, "sine")', "E133", "there is no activation 'sine', only gelu, "),
        ('inverse_wavelet(A, "db99")', "E133", "there is no wavelet 'db99', only db1, "),
        ('inverse_wavelet(X, "db1")', "E133", "'inverse_wavelet' takes 2 axes, and this has 3: X is [n, rank, k]"),
        ("A @ B", "E133", "'@' needs as many columns on its left as rows on its right: A is [rank, in], B is [out, "),
        ("A @ v", "E133", "'@' needs at least two axes on both sides: A is [rank, in], v is [in]"),
        ("A + B", "E133", "elementwise operators need equal sizes: A is [rank, in], B is [out, rank]"),
        ("v.T", "E133", "'.T' swaps the last two axes, and there is one: 'v' is [in]"),
        ("relu(alpha)", "E132", "'relu' takes a tensor, and 'alpha' is a number"),
        ("kron(A, 2)", "E132", "'kron' takes a tensor, and '2' is a whole number"),
        ("eye(A)", "E132", "'size' of 'eye' is a whole number, and 'A' is a tensor [rank, in]"),
        ("eye(alpha)", "E132", "'size' of 'eye' is a whole number, and 'alpha' is a number"),
        ("clamp(A, A, 1)", "E132", "'low' of 'clamp' takes a number, and 'A' is a tensor [rank, in]"),
        ("activation(A, 1)", "E132", "'name' of 'activation' takes a text, and '1' is a whole number"),
        ("reshape(A, in)", "E132", "'sizes' of 'reshape' is a list of 1 to 4 whole numbers, as in [out, rank]"),
        ("reshape(A, [])", "E132", "'sizes' of 'reshape' is a list of 1 to 4 whole numbers, as in [out, rank]"),
        ("reshape(A, [1, 1, 1, 1, in * rank])", "E132", "'sizes' of 'reshape' is a list of 1 to 4 whole numbers"),
        ("reshape(A, [alpha])", "E132", "'sizes' of 'reshape' is a whole number, and 'alpha' is a number"),
        ("norm(A)", "E138", "'norm' takes 2 arguments, not 1"),
        ("relu()", "E138", "'relu' takes 1 argument, not 0"),
        ("norm(A, axis = 1)", "E138", "the arguments of 'norm' have no names"),
        ("nrm(A, 1)", "E138", "there is no function 'nrm'"),
    ],
)
def test_misfits(text, code, message):
    with pytest.raises(SpecError) as caught:
        typed(text)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == code
    assert diagnostic.message.startswith(message), diagnostic.message
    assert diagnostic.span is not None


def numbers(*sizes):
    return tuple(map(Dim.constant, sizes))


@pytest.mark.parametrize(
    ("left", "right", "wanted"),
    [
        ((3, 4), (3, 4), (3, 4)),
        ((3, 4), (4,), (3, 4)),
        ((3, 1), (1, 4), (3, 4)),
        ((1,), (2, 3, 4), (2, 3, 4)),
        ((2, 1, 4), (3, 1), (2, 3, 4)),
    ],
)
def test_broadcast(left, right, wanted):
    assert broadcast(numbers(*left), numbers(*right)) == numbers(*wanted)
    assert broadcast(numbers(*right), numbers(*left)) == numbers(*wanted)


def test_broadcast_keeps_the_size_that_is_known():
    known, other = Dim.atom("in"), Dim.atom("(in) // (n)")
    assert broadcast((known,), (other,)) == broadcast((other,), (known,)) == (known,)
    assert broadcast((Dim.constant(1),), (other,)) == (other,)
    with pytest.raises(MisfitError):
        broadcast((known,), (Dim.atom("out"),))


def test_matmul_is_over_equal_leading_sizes():
    assert matmul(numbers(7, 2, 3), numbers(7, 3, 4)) == numbers(7, 2, 4)
    assert matmul(numbers(7, 2, 3), numbers(3, 4)) == numbers(7, 2, 4)
    with pytest.raises(MisfitError):
        matmul(numbers(7, 2, 3), numbers(6, 3, 4))
    assert transposed(numbers(7, 2, 3)) == numbers(7, 3, 2)


def test_sizes_that_only_a_site_can_tell_are_let_through_and_found_there():
    apart = Dim.atom("(in) // (n)")
    assert result("reshape", [(Dim.atom("in"),)], [(apart, Dim.atom("n"))]) == (apart, Dim.atom("n"))
    with pytest.raises(MisfitError, match="10 numbers do not make 9"):
        result("reshape", [numbers(10)], [numbers(3, 3)])
    with pytest.raises(MisfitError, match="has 6 \\* \\(6 - 1\\) / 2 numbers, and here are 14"):
        result("skew", [numbers(14)], [Dim.constant(6)])
    assert result("skew", [numbers(15)], [Dim.constant(6)]) == numbers(6, 6)


def test_a_tensor_has_at_most_four_axes():
    assert len(result("gather", [numbers(9, 2, 3), numbers(4, 5)], [])) == MAX_AXES
    with pytest.raises(MisfitError, match="at most 4 axes"):
        result("gather", [numbers(9, 2, 3), numbers(4, 5, 6)], [])
