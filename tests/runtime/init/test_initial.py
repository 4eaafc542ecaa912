"""How tensors start: every initialiser, seeds, what sites share, what comes from the base weight, what is given."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc.grammar.method.initialisers import INITIALISERS
from peftc.grammar.method.rule import Init
from peftc.grammar.spec.elaborate import read_spec
from peftc.passes.plan.plan import ParamKey
from peftc.passes.plan.resolve import resolve, survey
from peftc.runtime.init import initial as module
from peftc.runtime.init.initial import initial

CPU = torch.device("cpu")


def filled(function, *shape, **arguments):
    torch.manual_seed(0)
    given = {**dict(INITIALISERS.get(function, ())), **arguments}
    return module.filled(Init(function, tuple(given.items())), shape, dtype=torch.float32, device=CPU)


def test_constants():
    assert torch.equal(filled("zeros", 2, 3), torch.zeros(2, 3))
    assert torch.equal(filled("ones", 2, 3), torch.ones(2, 3))
    assert torch.equal(filled("constant", 2, 3, value=0.25), torch.full((2, 3), 0.25))


@pytest.mark.parametrize("arguments", [{}, {"mean": 2.0, "std": 0.5}])
def test_normal(arguments):
    values = filled("normal", 200, 200, **arguments)
    assert values.mean().item() == pytest.approx(arguments.get("mean", 0.0), abs=0.02)
    assert values.std().item() == pytest.approx(arguments.get("std", 1.0), rel=0.02)


@pytest.mark.parametrize(
    ("function", "arguments", "low", "high"),
    [
        ("uniform", {"low": -1.0, "high": 3.0}, -1.0, 3.0),
        # bound = sqrt(6 / ((1 + a * a) * fan_in)) with fan_in the second axis
        ("kaiming_uniform", {"a": math.sqrt(5)}, -1 / math.sqrt(100), 1 / math.sqrt(100)),
        ("kaiming_uniform", {"a": 0.0}, -math.sqrt(6 / 100), math.sqrt(6 / 100)),
        ("xavier_uniform", {}, -math.sqrt(6 / 400), math.sqrt(6 / 400)),
    ],
)
def test_uniform(function, arguments, low, high):
    values = filled(function, 300, 100, **arguments)
    width = high - low
    assert values.min().item() == pytest.approx(low, abs=0.01 * width)
    assert values.max().item() == pytest.approx(high, abs=0.01 * width)
    assert low <= values.min()
    assert values.max() <= high
    assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.01 * width)
    assert values.std().item() == pytest.approx(width / math.sqrt(12), rel=0.02)


def test_an_unknown_initialiser_is_our_bug():
    with pytest.raises(AssertionError, match="orthogonal"):
        filled("orthogonal", 2, 2)


def test_a_permutations_first_numbers():
    found = filled("randperm", 2, 3, limit=10.0)
    assert found.dtype == torch.int64
    assert found.shape == (2, 3)
    assert len(set(found.flatten().tolist())) == 6
    assert set(filled("randperm", 10, limit=10.0).tolist()) == set(range(10))


@pytest.fixture
def model():
    torch.manual_seed(5)
    return nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(3, 5, bias=False), "c": nn.Linear(6, 4)})


def made(model, items, on="all linear", given=None, head="", **values):
    """The tensors of a method with these items, by site and role."""
    text = f"method m({head}) {{ on linear, embedding, parameter {items} }} adapter x = m {{ on {on} }}"
    plan = resolve(read_spec(text).adapters[0], survey(model))
    keys = {ParamKey("x", *key): tensor for key, tensor in (given or {}).items()}
    found = initial(plan, model.state_dict(keep_vars=True).get, keys, **values)
    return {(key.site, key.role): tensor for key, tensor in found.items()}


SEEDED = "const A[2, in] = normal seeded 7 const B[out, 2] = uniform(-1, 1) seeded 7 W' = W + B @ A"


def test_a_seed_makes_the_same_twice_and_leaves_torchs_own_state(model):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = made(model, SEEDED)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    two = made(model, SEEDED)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = made(model, SEEDED.replace("seeded 7", "seeded 8"))
    assert not torch.equal(one["a", "A"], other["a", "A"])


def test_a_site_has_its_own_generator_in_the_order_of_the_method(model):
    found = made(model, SEEDED)
    for site, rows, columns in (("a", 4, 6), ("b", 5, 3)):
        generator = torch.Generator().manual_seed(7)
        assert torch.equal(found[site, "A"], torch.empty(2, columns).normal_(generator=generator))
        assert torch.equal(found[site, "B"], torch.empty(rows, 2).uniform_(-1, 1, generator=generator))
    assert torch.equal(found["a", "A"], found["c", "A"])


def test_a_seed_may_come_from_a_hyperparameter(model):
    items = SEEDED.replace("seeded 7", "seeded start + 1")
    assert torch.equal(made(model, items, head="start: int = 6")["a", "A"], made(model, SEEDED)["a", "A"])


def test_what_sites_share_is_made_once(model):
    shared = "shared const A[2, max_in] = normal seeded 7 shared const B[max_out, 2] = normal seeded 7"
    found = made(
        model, f'{shared} param v[2, 1] = ones saved "v" W\' = W + slice(B, 0, 0, out) @ (v * slice(A, 1, 0, in))'
    )
    assert set(found) == {("", "A"), ("", "B"), *((site, "v") for site in "abc")}
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(found["", "A"], torch.empty(2, 6).normal_(generator=generator))
    assert torch.equal(found["", "B"], torch.empty(5, 2).normal_(generator=generator))


def test_what_comes_from_the_base_weight(model):
    items = """param m[out, 1] = norm(W, 1) saved "m" const Q[out, 2] = left_singular(W, 2) recomputed
        param B[out, 2] = 2 * Q saved "B" param d[out] = b + 1 saved "d" W' = W * m + B @ Q.T @ W b' = d"""
    found = made(model, items, on="a, c")
    weight = model["a"].weight.detach()
    assert_close(found["a", "m"], weight.norm(dim=1, keepdim=True))
    assert_close(found["a", "Q"], torch.linalg.svd(weight).U[:, :2])
    assert_close(found["a", "B"], 2 * found["a", "Q"])
    assert_close(found["a", "d"], model["a"].bias.detach() + 1)
    assert not any(each.requires_grad for each in found.values())
    with torch.no_grad():
        found["a", "m"].zero_()
    assert not torch.equal(made(model, items, on="a, c")["a", "m"], found["a", "m"])
    assert weight.any()


def test_a_start_never_shares_the_bases_memory(model):
    found = made(model, 'param V[out, in] = W saved "V" W\' = V', on="a")
    assert torch.equal(found["a", "V"], model["a"].weight)
    assert found["a", "V"].data_ptr() != model["a"].weight.data_ptr()


def test_a_start_of_a_low_precision_base_is_float32(model):
    found = made(model.to(torch.bfloat16), 'param m[out, 1] = norm(W, 1) saved "m" W\' = W * m', on="a")
    assert found["a", "m"].dtype == torch.float32
    assert_close(found["a", "m"], model["a"].weight.detach().float().norm(dim=1, keepdim=True))


def test_at_an_embedding_the_weight_is_as_it_is_read():
    model = nn.ModuleDict({"e": nn.Embedding(7, 3)})
    found = made(model, 'param m[1, in] = norm(W, 0) saved "m" W\' = W * m', on="e")
    assert_close(found["e", "m"], model["e"].weight.detach().norm(dim=1)[None])


@pytest.fixture
def stack():
    torch.manual_seed(5)
    holder = nn.Module()
    holder.up = nn.Parameter(torch.randn(3, 4, 5))
    return SimpleNamespace(model=nn.ModuleDict({"experts": holder}), weight=holder.up.detach())


def test_over_a_stack_each_expert_starts_from_its_own_weight(stack):
    items = """param m[out, 1] = norm(W, 1) saved "m" param B[out, 2] = left_singular(W, 2) saved "B"
        param A[2, in] = right_singular(W, 2) saved "A" W' = W * m + B @ A"""
    found = made(stack.model, items, on="experts.up")
    assert found["experts.up", "m"].shape == (4, 3)
    for expert, weight in enumerate(stack.weight):
        left, _, right = torch.linalg.svd(weight)
        assert_close(found["experts.up", "m"][:, expert::3], weight.norm(dim=1, keepdim=True))
        assert_close(found["experts.up", "B"][:, expert::3], left[:, :2])
        assert_close(found["experts.up", "A"][2 * expert : 2 * expert + 2], right[:2])


def test_over_a_stack_each_expert_has_its_own_draw(stack):
    items = """param V[out, in] = kaiming_uniform(a = sqrt(5)) saved "V" param u[in] = ones saved "u"
        const i[4] = randperm(5) seeded 3
        W' = W + V * u + scatter(gather(u, i), i, [1, in])"""
    found = made(stack.model, items, on="experts.up")
    bound, numbers = 1 / math.sqrt(5), found["experts.up", "i"]
    assert found["experts.up", "V"].shape == (3, 4, 5)
    assert 0.8 * bound < found["experts.up", "V"].abs().max() <= bound  # of one expert's fan, not of the stack's
    assert numbers.shape == (3, 4)
    assert all(len(set(each.tolist())) == 4 for each in numbers)
    assert numbers.max() < 5


def test_given_tensors_are_kept_and_the_others_follow_them(model):
    torch.manual_seed(0)
    items = 'const Q[out, 2] = left_singular(W, 2) recomputed param B[out, 2] = 2 * Q saved "B" W\' = W + B @ Q.T @ W'
    given = torch.randn(4, 2, dtype=torch.bfloat16)
    found = made(model, items, on="a", given={("a", "Q"): given})
    assert found["a", "Q"].dtype == torch.float32
    assert torch.equal(found["a", "Q"], given.float())
    assert torch.equal(found["a", "B"], 2 * given.float())
    assert made(model, items, on="a", given={("a", "Q"): given}, upcast=False)["a", "Q"].dtype == torch.float32
    kept = made(model.bfloat16(), items, on="a", given={("a", "Q"): given}, upcast=False)
    assert {each.dtype for each in kept.values()} == {torch.bfloat16}
    assert torch.equal(kept["a", "Q"], given)
    assert torch.equal(kept["a", "B"], 2 * given)
    assert kept["a", "Q"].data_ptr() != given.data_ptr()


def test_a_given_tensor_leaves_the_others_of_its_seed_as_they_were(model):
    fresh = made(model, SEEDED)
    found = made(model, SEEDED, given={("a", "A"): torch.zeros(2, 6)})
    assert not found["a", "A"].any()
    assert torch.equal(found["a", "B"], fresh["a", "B"])


def test_draws_may_be_coarse():
    found = filled("uniform", 2000, low=0.0, high=1.0, digits=8.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float())
    assert not torch.equal(found, filled("uniform", 2000, low=0.0, high=1.0))


def test_balanced_numbers_occur_equally_often():
    counts = filled("balanced", 4, 11, limit=9.0).flatten().bincount(minlength=9)
    assert sorted(counts.tolist()) == [4] + [5] * 8
    few = filled("balanced", 3, limit=9.0).tolist()
    assert len(set(few)) == 3


def test_distinct_numbers_differ_along_the_last_axis():
    found = filled("distinct", 50, 4, limit=5.0)
    assert found.dtype == torch.int64
    assert all(len(set(row)) == 4 and max(row) < 5 for row in found.tolist())
    assert len({tuple(row) for row in found.tolist()}) > 1


def test_what_only_starts_need_is_not_kept(model):
    items = "shared const deal[2 * total_in] = balanced(limit = 3) seeded 7 "
    items += "const p[2, in] = reshape(slice(deal, 0, 2 * before_in, 2 * before_in + 2 * in), [2, in]) recomputed "
    items += "shared param t[3] = zeros saved 't' param B[out, 2] = zeros saved 'B' W' = W + B @ gather(t, p)"
    found = made(model, items.replace("'t'", '"t"').replace("'B'", '"B"'))
    assert {role for _, role in found} == {"p", "t", "B"}
    dealt = torch.cat([found[name, "p"].flatten() for name in "abc"])
    assert sorted(dealt.bincount(minlength=3).tolist()) == [10, 10, 10]


def test_groups_of_sites_share_a_tensor(model):
    items = 'shared param v[in] = uniform(1, 2) saved "v" by site % 2 W\' = W + reshape(v, [1, in])'
    found = made(model, items, on="a, c")
    assert set(found) == {("", "v.0"), ("", "v.1")}
    assert not torch.equal(found["", "v.0"], found["", "v.1"])
    one = made(model, items.replace("site % 2", "site // 2"), on="a, c")
    assert set(one) == {("", "v.0")}


def placed(function: str, count: int, seed: int | None = None, **arguments: float) -> torch.Tensor:
    init = Init(function, tuple(arguments.items()))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return module.filled(init, (2, count), dtype=torch.float32, device=CPU, generator=generator)


def test_places_are_distinct_and_in_order() -> None:
    found = placed("places", 10, 7, rows=3.0, columns=5.0)
    flat = found[0] * 5 + found[1]
    assert found[0].max() < 3
    assert found[1].max() < 5
    assert (flat.diff() > 0).all()
    assert torch.equal(found, placed("places", 10, 7, rows=3.0, columns=5.0))
    assert not torch.equal(found, placed("places", 10, 8, rows=3.0, columns=5.0))


def test_all_places_beside_the_diagonal() -> None:
    row, column = placed("off_diagonal", 12, size=4.0)
    assert not (row == column).any()
    assert sorted((row * 4 + column).tolist()) == [each for each in range(16) if each % 5]
