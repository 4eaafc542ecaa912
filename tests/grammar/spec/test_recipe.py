"""What each way to combine reads, and what is no setting."""

import pytest

from peftc.grammar.spec.recipe import KINDS, Recipe, like_kind


def test_the_ways_are_pefts():
    named = ["cat", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd", "linear", "magnitude_prune"]
    assert sorted(KINDS) == [*named, "magnitude_prune_svd", "svd", "ties", "ties_svd"]
    assert all(Recipe(kind).is_known for kind in KINDS)
    assert not Recipe("linear_svd").is_known


@pytest.mark.parametrize(
    ("setting", "kinds"),
    [
        ("density", {each for each in KINDS if each.startswith(("ties", "dare", "magnitude"))}),
        ("majority_sign_method", {"ties", "ties_svd", "dare_ties", "dare_ties_svd"}),
        ("svd_rank", {each for each in KINDS if each.endswith("svd")}),
        ("svd_clamp", {each for each in KINDS if each.endswith("svd")}),
        ("svd_driver", {each for each in KINDS if each.endswith("svd")}),
    ],
)
def test_what_a_way_reads(setting, kinds):
    assert {each for each in KINDS if Recipe(each).reads(setting)} == kinds


def test_what_is_not_read_is_told():
    assert Recipe("linear", density=0.5, rank=2).unread() == ("density", "svd_rank")
    assert Recipe("ties", density=0.5, clamp=0.9).unread() == ("svd_clamp",)
    assert Recipe("cat", majority="frequency").unread() == ("majority_sign_method",)
    assert Recipe("ties_svd", 0.5, "frequency", clamp=0.9, rank=3, driver="gesvd").unread() == ()


@pytest.mark.parametrize(
    ("recipe", "setting"),
    [
        (Recipe("ties"), ""),
        (Recipe("ties", density=-1), "density"),
        (Recipe("dare_linear", density=0), "density"),
        (Recipe("svd", rank=0), "svd_rank"),
        (Recipe("svd", clamp=2), "svd_clamp"),
        (Recipe("svd", driver="fast"), "svd_driver"),
        (Recipe("ties", 0.5, "most"), "majority_sign_method"),
    ],
)
def test_the_setting_at_fault_is_named(recipe, setting):
    found = recipe.fault()
    assert found is not None
    assert found.setting == setting
    assert (setting or "density") in found.message + found.help


@pytest.mark.parametrize("recipe", [Recipe(), Recipe("ties", 0.5), Recipe("magnitude_prune", 0), Recipe("svd", rank=1)])
def test_what_is_sound_has_no_fault(recipe):
    assert recipe.fault() is None


def test_the_nearest_way_is_named_or_all():
    assert like_kind("tie") == "did you mean 'ties'?"
    assert all(kind in like_kind("zzz") for kind in KINDS)
