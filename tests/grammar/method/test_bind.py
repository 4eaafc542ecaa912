import math

import pytest

from peftc.grammar.algebra import algebra
from peftc.grammar.diagnostics import SpecError
from peftc.grammar.method.bind import Place, bind
from peftc.grammar.method.check import check_method
from peftc.grammar.method.rule import Init, MethodRule
from peftc.grammar.source import Source
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.spec.values import complete, partial
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.parse import parse

LORA = builtin_methods()["lora"]


def arguments(text: str) -> tuple[tree.Argument, ...]:
    (adapter,) = parse(Source("x", f"adapter a = lora({text})")).statements
    assert isinstance(adapter, tree.Adapter)
    return adapter.method.arguments


def rule(items: str, head: str = "rank: int = 8, alpha: float = 1") -> MethodRule:
    (method,) = parse(Source("x", f"method m({head}) {{ on linear, parameter {items} }}")).statements
    assert isinstance(method, tree.Method)
    return check_method(method)


def bound(text: str = "", rows: int = 64, columns: int = 96, *, strict: bool = True, kind: str = "linear", **place):
    values = complete(LORA, arguments(text))
    return bind(LORA, values, Place(kind, rows, columns, **place), strict=strict)


def test_complete_fills_in_defaults_and_converts():
    values = complete(LORA, arguments("rank = 2 * 8, alpha = 32, rslora = true"))
    assert dict(values) == {
        "rank": 16,
        "alpha": 32.0,
        "dropout": 0.0,
        "rslora": True,
        "bias": False,
        "init": "default",
    }
    assert [type(value) for _, value in values] == [int, float, float, bool, bool, str]
    assert partial(LORA, arguments("alpha = 1")) == (("alpha", 1.0),)
    assert complete(LORA, arguments("rank = 4.0"))[0] == ("rank", 4)


@pytest.mark.parametrize(
    ("text", "code", "span"),
    [
        ("rnk = 4", "E141", "rnk = 4"),
        ("4", "E141", "4"),
        ("rank = 4, rank = 4", "E143", "rank = 4"),
        ("rank = 1.5", "E142", "1.5"),
        ("rank = true", "E142", "true"),
        ("rank = none", "E142", "none"),
        ('alpha = "x"', "E142", '"x"'),
        ("rslora = 1", "E142", "1"),
        ("alpha = rank", "E142", "rank"),
        ("alpha = 1 / 0", "E213", "1 / 0"),
        ("alpha = 10 ** 400", "E213", "10 ** 400"),
        ("rank = 99999999999 * 99999999999", "E213", "99999999999 * 99999999999"),
    ],
)
def test_bad_arguments(text, code, span):
    with pytest.raises(SpecError) as caught:
        complete(LORA, arguments(text))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == code
    assert diagnostic.span is not None
    assert diagnostic.span.text == span


def test_lora_at_a_linear():
    found = bound("rank = 4, alpha = 8")
    assert algebra.text(found.weight) == "W + s * (B @ A)"
    assert found.scalars == (("s", 2.0),)
    assert [(each.role, each.shape, each.saved) for each in found.params] == [
        ("A", (4, 96), "lora_A.weight"),
        ("B", (64, 4), "lora_B.weight"),
    ]
    assert found.params[0].init == Init("kaiming_uniform", (("a", math.sqrt(5)), ("copies", 1.0)))


def test_the_tree_is_the_structure_and_not_the_factors():
    assert bound("rank = 4, alpha = 8").weight == bound("rank = 16, alpha = 3, rslora = true").weight
    assert bound("rank = 16, alpha = 3, rslora = true").scalars == (("s", 0.75),)
    assert algebra.text(bound("dropout = 0.25").weight) == "W + s * (B @ drop(A, 0.25))"


def test_an_embedding_has_its_own_keys_and_initialisers():
    found = bound("rank = 4", kind="embedding")
    assert [(each.init, each.saved) for each in found.params] == [
        (Init("zeros"), "lora_embedding_A"),
        (Init("normal", (("mean", 0.0), ("std", 1.0))), "lora_embedding_B"),
    ]


def test_experts_lie_side_by_side():
    found = bound("rank = 4", kind="parameter", count=3)
    assert [each.shape for each in found.params] == [(12, 96), (64, 12)]


def test_factors_without_a_name_get_one():
    found = bind(
        rule(
            'param A[out, in] = zeros saved "A" param C[out, in] = zeros saved "C" '
            "let c0 = alpha W' = W - 2 * rank * A / alpha + c0 * (-C * A) - (C if rank > 9 else A) * W",
            "rank: int = 8, alpha: float = 4",
        ),
        (("rank", 8), ("alpha", 4.0)),
        Place("linear", 4, 4),
    )
    assert algebra.text(found.weight) == "W + c3 * (c2 * (c1 * A)) + c0 * ((c4 * C) * A) + c5 * (A * W)"
    assert dict(found.scalars)["c0"] == 4.0
    assert sorted(dict(found.scalars).values()) == [-1.0, -1.0, -1.0, 0.25, 4.0, 16.0]
    assert not [each for each in algebra.walk(found.weight) if isinstance(each, algebra.Dropped)]


@pytest.mark.parametrize(
    ("text", "code", "options"),
    [
        ("rank = 0", "E210", {}),
        ("rank = -3", "E210", {}),
        ("rank = 65", "E211", {}),
        ("rank = 1000000000", "E210", {"strict": False}),
        ("dropout = 1", "E212", {}),
        ("dropout = -0.1", "E212", {}),
        ("dropout = 0.1", "E212", {"kind": "parameter"}),
        ("", "E214", {"kind": "other"}),
    ],
)
def test_bind_refuses(text, code, options):
    with pytest.raises(SpecError) as caught:
        bound(text, **options)
    assert caught.value.diagnostics[0].code == code


def test_numbers_are_finite():
    values = tuple((name, math.inf if name == "alpha" else value) for name, value in complete(LORA, ()))
    with pytest.raises(SpecError, match="E213"):
        bind(LORA, values, Place("linear", 64, 64))


def test_a_checkpoint_may_have_a_rank_over_size():
    assert bound("rank = 65", strict=False).params[0].shape == (65, 96)


def test_the_site_is_named():
    with pytest.raises(SpecError, match=r"rank = 65 is more than 'model\.q' of size 64 x 96 can use"):
        bound("rank = 65", name="model.q")


def test_tensors_without_one_size_of_their_own_are_stacked_in_front():
    full = rule(
        'param A[out, in] = zeros saved "A" param v[in] = zeros saved "v" param C[rank, rank] = zeros saved "C" '
        "W' = W + A * v * sum(reshape(C, [1, rank * rank]), 1)",
        "rank: int = 8",
    )
    found = bind(full, (("rank", 3),), Place("parameter", 4, 5, count=2))
    assert [each.shape for each in found.params] == [(2, 4, 5), (2, 5), (2, 3, 3)]
