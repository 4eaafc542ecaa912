"""A rule at a place: conditions, requirements, options, and a bias that is not there."""

import pytest

from peftc.grammar.algebra import algebra
from peftc.grammar.diagnostics import SpecError
from peftc.grammar.method.bind import Place, bind
from peftc.grammar.method.check import check_method
from peftc.grammar.source import Source
from peftc.grammar.spec.values import complete
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.parse import parse


def bound(items, head="", place=None, **values):
    (method,) = parse(Source("x", f"method m({head}) {{ on linear, conv1d {items} }}")).statements
    assert isinstance(method, tree.Method)
    rule = check_method(method)
    given = tuple((name, values.get(name, value)) for name, value in complete(rule, ()))
    return bind(rule, given, place or Place("linear", 4, 6, name="model.q"))


def refused(*args, **kwargs):
    with pytest.raises(SpecError) as caught:
        bound(*args, **kwargs)
    (diagnostic,) = caught.value.diagnostics
    return f"{diagnostic.code}: {diagnostic.message}", diagnostic


BARE = Place("linear", 4, 6, has_bias=False, name="model.q")
C = 'param c[out] = zeros saved "c" W\' = W '


@pytest.mark.parametrize(
    ("bias", "there", "bare"),
    [
        ("b", None, None),
        ("b + c", "b + c", "c"),
        ("c - b", "c + c0 * b", "c"),
        ("c * b", "c * b", None),
        ("2 * b / 3", "c1 * (c0 * b)", None),
        ("reshape(b, [out]) + c", "reshape(b, [4]) + c", "c"),
        ("c + slice(c, 0, 0, 1)", "c + slice(c, 0, 0, 1)", "c + slice(c, 0, 0, 1)"),
        ("c * 0 + b + slice(c, 0, 0, 1)", None, "c0 * c + slice(c, 0, 0, 1)"),
        ("b + slice(c, 0, 0, 1)", None, "tile(reshape(slice(c, 0, 0, 1), [1]), [4])"),
    ],
)
def test_a_bias_that_is_not_there_is_zero(bias, there, bare):
    items = f"{C} + reshape(c, [out, 1]) b' = {bias}"
    for place, wanted in ((None, there), (BARE, bare)):
        found = bound(items, place=place).bias
        found = found and algebra.without_bias(found) if place is BARE else found
        if wanted is not None:
            assert found is not None
            assert algebra.text(found) == wanted
        elif place is BARE or bias == "b":
            assert found is None


def test_a_bias_in_the_weight_is_zero_too():
    items = f"{C} + reshape(b + c, [out, 1])"
    assert algebra.text(bound(items).weight) == "W + reshape(b + c, [4, 1])"
    assert algebra.text(bound(items, place=BARE).weight) == "W + reshape(c, [4, 1])"


def test_what_needs_a_bias_says_so():
    assert refused(f"{C} b' = c * relu(b)", place=BARE)[0] == "E217: 'm' needs a bias, and 'model.q' has none"
    start = 'param c[out] = b saved "c" W\' = W * reshape(c, [out, 1])'
    assert refused(start, place=BARE)[0] == "E217: 'b' is nothing at 'model.q', which has no bias"
    assert algebra.text(bound(start).params[0].init.value) == "b"


CONDITIONAL = """param A[out, 1] = ones saved "s" if tall param B[1, in] = ones saved "s" if not tall
    W' = W * A if tall else W * B"""


def test_conditions_choose_the_parameters():
    for tall, role, shape in ((True, "A", (4, 1)), (False, "B", (1, 6))):
        found = bound(CONDITIONAL, "tall: bool = true", tall=tall)
        assert [(each.role, each.shape, each.saved) for each in found.params] == [(role, shape, "s")]
        assert algebra.text(found.weight) == f"W * {role}"


def test_a_condition_may_look_at_the_site():
    items = CONDITIONAL.replace("not tall", "out <= in").replace("tall", "out > in")
    assert bound(items).params[0].role == "B"
    assert bound(items, place=Place("linear", 6, 4)).params[0].role == "A"


def test_a_parameter_that_is_not_there_cannot_be_used():
    items = 'param A[out, 1] = ones saved "s" if tall W\' = W * A'
    text, found = refused(items, "tall: bool = true", tall=False)
    assert text == "E217: 'A' is used at 'model.q', where its condition does not hold"
    assert found.span is not None
    assert found.span.text == "A"


def test_two_that_exist_together_cannot_have_one_key():
    items = CONDITIONAL.replace("if not tall", "if wide") + " * (B if wide else sum(W, 0))"
    assert refused(items, "tall: bool = true, wide: bool = true")[0] == (
        "E217: 'A' and 'B' would both be saved as 's' there"
    )


def test_requirements_tell_the_values():
    items = 'require in % block == 0 and out > block param A[out, in] = zeros saved "A" W\' = W + A'
    assert bound(items, "block: int = 3")
    text, found = refused(items, "block: int = 4")
    assert text == "E216: 'm' does not fit 'model.q': it needs in % block == 0 and out > block"
    assert found.help == "there block = 4 and in = 6 and out = 4"


def test_what_only_numbers_show_does_not_fit():
    items = 'param C[n, out // n, in // n] = ones saved "C" W\' = W + block_diag(C)'
    assert bound(items, "n: int = 2").params[0].shape == (2, 2, 3)
    text, _ = refused(items, "n: int = 4")
    assert text.startswith("E216: 'm' does not fit 'model.q' of size 4 x 6: elementwise operators need equal sizes: ")
    assert "block_diag(C) is [4, 4]" in text
    assert refused(items, "n: int = 5")[0].startswith("E210: out // n = 0 leaves the parameter 'C' empty")
    assert refused(items, "n: int = 0")[0].startswith("E210: n = 0 leaves the parameter 'C' empty")


def test_options_take_their_values():
    items = 'param A[out, in] = zeros saved "A" let k = rank + 1 W\' = W + roll(clamp(A, -s, s), k, 1) + eye(out) @ A'
    found = bound(items, "rank: int = 2, s: float = 0.5", rank=4)
    functions = [(each.name, each.options) for each in algebra.walk(found.weight) if isinstance(each, algebra.Function)]
    assert functions == [("roll", (5, 1)), ("clamp", (-0.5, 0.5)), ("eye", (4,))]


def test_numbers_with_tensors():
    items = 'param A[out, in] = ones saved "A" W\' = 1 / (2 + A) - A / 4 + (3 - A) + W'
    found = bound(items)
    assert algebra.text(found.weight) == "c0 * (1 / (A + 2)) + c2 * (c1 * A) + c3 * A + 3 + W"
    assert dict(found.scalars) == {"c0": 1.0, "c1": 0.25, "c2": -1.0, "c3": -1.0}


def test_sizes_of_all_sites():
    items = 'shared param A[sites, max_in] = ones saved "A" W\' = W * slice(sum(A, 0), 1, 0, in)'
    place = Place("linear", 4, 6, largest=(9, 8), sites=3, count=1)
    (param,) = bound(items, place=place).params
    assert (param.shape, param.shared) == ((3, 9), True)


def test_sizes_under_a_kernel():
    items = 'param A[channels, 1] = ones saved "A" W\' = W * reshape(tile(A, [1, kernel]), [1, in])'
    assert bound(items, place=Place("linear", 4, 6)).params[0].shape == (6, 1)
    items = 'param A[out, channels, kernel] = ones saved "A" W\' = W + reshape(A, [out, channels * kernel])'
    assert bound(items, place=Place("linear", 4, 6, kernel=3)).params[0].shape == (4, 2, 3)


@pytest.mark.parametrize(
    ("stored", "saved", "optional", "written", "seed"),
    [
        ('saved "A"', "A", False, True, None),
        ('saved "A" when keep', "", False, False, None),
        ('saved "A" when not keep seeded n + 1', "A", True, True, 8),
        ('saved "A" when keep seeded n', "A", True, False, 7),
        ("seeded n", "", True, True, 7),
    ],
)
def test_where_a_constant_comes_from(stored, saved, optional, written, seed):
    head = "keep: bool = false, n: int = 7"
    items = f"const A[out, in] = normal {stored} W' = W + A if n > 0 and not keep else W - A"
    (param,) = bound(items, head).params
    assert not param.trained
    assert (param.saved, param.optional, param.written, param.seed) == (saved, optional, written, seed)
