"""The arithmetic of combining updates, by hand."""

import pytest
import torch
from torch.testing import assert_close

from peftc.grammar.diagnostics import UsageError
from peftc.grammar.spec.recipe import KINDS, Recipe
from peftc.runtime.merge import combine
from peftc.runtime.merge.combine import Update, check, combined, mixed


def same(weight):
    return weight


def update(seed, rank=2, weight=1.0, scale=1.0, dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 5, generator=made), torch.randn(4, rank, generator=made)
    return Update(a.to(dtype), b.to(dtype), scale, weight)


def made_of(updates, recipe, rank):
    a, b = combined(updates, recipe, rank, same, same)
    assert a.shape == (rank, 5)
    assert b.shape == (4, rank)
    return b @ a


def exact(updates):
    return sum(each.weight * each.scale * each.b @ each.a for each in updates)


BOTH = [update(0, weight=0.7, scale=1.5), update(1, weight=-0.4, scale=3.0)]


@pytest.mark.parametrize(("kind", "rank"), [("cat", 4), ("cat", 6), ("svd", 4), ("svd", 7)])
def test_an_exact_sum(kind, rank):
    assert_close(made_of(BOTH, Recipe(kind), rank), exact(BOTH))


def test_the_largest_singular_values():
    u, s, v = torch.linalg.svd(exact(BOTH), full_matrices=False)
    assert_close(made_of(BOTH, Recipe("svd"), 2), u[:, :2] * s[:2] @ v[:2])
    assert_close(made_of(BOTH, Recipe("svd", clamp=1.0), 2), u[:, :2] * s[:2] @ v[:2])


def test_what_is_cut_off():
    free = combined(BOTH, Recipe("svd", clamp=1.0), 3, same, same)
    numbers = torch.cat([each.flatten() for each in free])
    bound = torch.quantile(numbers, 0.9)
    cut = combined(BOTH, Recipe("svd", clamp=0.9), 3, same, same)
    for before, after in zip(free, cut, strict=True):
        assert_close(after, before.clamp(-bound, bound))
    assert any((before - after).abs().max() > 0.01 for before, after in zip(free, cut, strict=True))
    with pytest.raises(UsageError, match="bounds nothing"):
        combined(BOTH, Recipe("svd", clamp=0.0), 3, same, same)


def test_factors_are_summed():
    (first, second), root = BOTH, [(0.7 * 1.5) ** 0.5, (0.4 * 3.0) ** 0.5]
    a, b = combined(BOTH, Recipe("linear"), 2, same, same)
    assert_close(a, root[0] * first.a - root[1] * second.a)
    assert_close(b, root[0] * first.b + root[1] * second.b)
    assert_close(made_of(BOTH[1:], Recipe("linear"), 2), exact(BOTH[1:]))


def test_smaller_factors_are_filled_with_zeros():
    a, b = combined(BOTH, Recipe("linear"), 5, same, same)
    assert not a[2:].any()
    assert not b[:, 2:].any()


TENSORS = [torch.tensor([[4.0, -1.0, 2.0, -3.0]]), torch.tensor([[-5.0, -2.0, 0.5, 1.0]])]


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        (Recipe("linear"), [[4 - 10, -1 - 4, 2 + 1, -3 + 2]]),
        (Recipe("magnitude_prune", density=0.5), [[4 - 10, -4, 0, -3]]),
        # Signs: 4 - 5 < 0, -2 < 0, none, -3 < 0.
        (Recipe("ties", density=0.5), [[-10, -4, 0, -3]]),
        (Recipe("ties", density=1.0), [[-10, (-1 - 4) / 2, (2 + 1) / 2, -3]]),
        # One of each: what is even is positive.
        (Recipe("ties", density=1.0, majority="frequency"), [[4, (-1 - 4) / 2, (2 + 1) / 2, 2]]),
        (Recipe("magnitude_prune", density=0.0), [[0, 0, 0, 0]]),
    ],
)
def test_numbers(recipe, wanted):
    assert_close(mixed(TENSORS, [1.0, 2.0], recipe), torch.tensor(wanted, dtype=torch.float32))


def test_what_is_dropped_by_chance_is_made_up_for():
    torch.manual_seed(0)
    ones = torch.ones(200, 200)
    found = mixed([ones], [1.0], Recipe("dare_linear", density=0.25))
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert abs(float(found.mean()) - 1) < 0.05
    again = mixed([ones], [1.0], Recipe("dare_linear", density=0.25))
    assert not torch.equal(found, again)


def test_a_negative_weight_takes_away():
    """Signs are elected before weights."""
    found = mixed([TENSORS[0], TENSORS[0]], [1.0, -1.0], Recipe("ties", density=1.0))
    assert_close(found, torch.zeros(1, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_halves_are_combined_in_float32(kind, dtype):
    halves = [update(0, weight=0.7, dtype=dtype), update(1, weight=-0.4, dtype=dtype)]
    wide = [Update(each.a.float(), each.b.float(), each.scale, each.weight) for each in halves]
    recipe = Recipe(kind, density=0.5)
    found = []
    for updates in (halves, wide):
        torch.manual_seed(0)
        found.append(combined(updates, recipe, 4, same, same))
    for half, exact_one in zip(*found, strict=True):
        assert half.dtype == dtype
        assert torch.equal(half, exact_one.to(dtype))


def test_a_quantile_of_any_length():
    values = torch.randn(1001)
    for share in (0.0, 0.333, 0.9, 1.0):
        assert_close(combine._quantile(values, share), float(torch.quantile(values, share)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "code", "message"),
    [
        (Recipe("lineer"), "E581", "no combination_type 'lineer'"),
        (Recipe(None), "E581", "no combination_type None"),
        (Recipe("svd_svd"), "E581", "no combination_type"),
        (Recipe("linear_svd"), "E581", "no combination_type"),
        (Recipe("ties"), "E584", "which is not said"),
        (Recipe("ties", density=-0.1), "E584", "density = -0.1"),
        (Recipe("ties", density=float("nan")), "E584", "density = nan"),
        (Recipe("ties", density="half"), "E584", "density = 'half'"),
        (Recipe("dare_ties_svd", density=0), "E584", "more than 0"),
        (Recipe("svd", rank=0), "E584", "svd_rank = 0"),
        (Recipe("svd", rank=True), "E584", "svd_rank = True"),
        (Recipe("svd", rank=2.0), "E584", "svd_rank = 2.0"),
        (Recipe("svd", clamp=1.5), "E584", "svd_clamp = 1.5"),
        (Recipe("svd", driver="fast"), "E584", "svd_driver = 'fast'"),
        (Recipe("linear", majority="most"), "E584", "majority_sign_method = 'most'"),
    ],
)
def test_refusals(recipe, code, message):
    with pytest.raises(UsageError, match=message) as caught:
        check(recipe)
    assert {each.code for each in caught.value.diagnostics} == {code}
    assert isinstance(caught.value, ValueError)


def test_a_driver_of_another_device_is_refused():
    with pytest.raises(UsageError, match="one of CUDA"):
        combined(BOTH, Recipe("svd", driver="gesvd"), 2, same, same)
