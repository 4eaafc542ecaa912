import pytest
import torch

from peftc.grammar.algebra import algebra as al
from peftc.grammar.method.bind import stacked_axis
from peftc.grammar.method.rule import ParamRule
from peftc.grammar.syntax import tree
from peftc.passes.plan.structure import (
    WEIGHT,
    CopiedTensor,
    copy_slot,
    float_of,
    site_slot,
    slot_role,
    structure_of,
    weighted,
)

A = "adapter a = lora(rank = 2, alpha = 6) { on all linear }"


def test_rank_names_and_values_are_not_structure(lab):
    one = lab.active("Two", A).structure
    other = lab.active("Two", "adapter other = lora(rank = 3, alpha = 1) { on all linear }").structure
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    "specs",
    [
        ("adapter a = lora(rank = 2, alpha = 6) { on first }",),
        ("adapter a = lora(rank = 2, alpha = 6, dropout = 0.1) { on all linear }",),
        ("adapter a = lora(rank = 2, alpha = 6) { on all linear  bias adapter }",),
        (A, A.replace("adapter a", "adapter b")),
    ],
    ids=["sites", "dropout", "bias", "two"],
)
def test_what_is_structure(specs, lab):
    assert lab.active("Two", *specs).structure != lab.active("Two", A).structure


def test_types_are_structure(lab):
    (plan,) = lab.active("Two", A).plans
    kinds = [
        structure_of([(plan, {(at.site.name, role): dtype for at in plan.sites for role in "AB"})])
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert kinds[0] != kinds[1]


def test_terms_keep_the_order_of_activation(lab):
    only_second = "adapter b = lora(rank = 2) { on second }"
    structure = lab.active("Two", only_second, A).structure
    positions = {each.site.name: [term.position for term in each.terms] for each in structure.sites}
    assert positions == {"second": [0, 1], "first": [1]}
    (term, _) = next(each for each in structure.sites if each.site.name == "second").terms
    assert [role.name for role in term.roles] == ["A", "B"]
    assert term.scalars == ("s",)


def test_copies(lab):
    structure = lab.active("Two", "adapter a = lora(rank = 2) { on second  train first }").structure
    assert structure.copies == (
        CopiedTensor(0, "first", "weight", torch.float32, True),
        CopiedTensor(0, "first", "bias", torch.float32, True),
    )
    assert [each.target for each in structure.copies] == ["first.weight", "first.bias"]


def test_weighted():
    d = al.Product(al.Param("B"), al.Param("A"))
    scaled = al.Sum(al.Weight(), al.Scaled("s", d))
    assert weighted(scaled) == (scaled, "s")
    assert weighted(al.Sum(al.Weight(), d)) == (al.Sum(al.Weight(), al.Scaled(WEIGHT, d)), WEIGHT)
    assert weighted(al.Hadamard(al.Weight(), al.Param("v"))) == (al.Hadamard(al.Weight(), al.Param("v")), None)


def test_a_scalar_used_twice_cannot_carry_the_weight():
    """`W + s * (D + s * E)`: to scale s would scale E twice."""
    matrix = al.Sum(al.Weight(), al.Scaled("s", al.Sum(al.Param("D"), al.Scaled("s", al.Param("E")))))
    changed, carrier = weighted(matrix)
    assert carrier == WEIGHT
    assert al.text(changed) == "W + weight * (s * (D + s * E))"


def test_slots():
    assert site_slot(1, "model.layers.0.q") == "slots.p1__model__layers__0__q"
    assert copy_slot(0, "model.norm") == "copies.p0__model__norm"
    assert slot_role("inner.weight") == "inner__weight"
    assert len({site_slot(0, each) for each in ("a.b", "a__b", "a_.b", "a._b", "a___b")}) == 5
    assert float_of("slots.p0__q.s") == "slots.p0__q.float__s"


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        (("rank", "in"), 0),
        (("out", "rank"), 1),
        (("out", "in"), None),
        (("in", "out"), None),
        (("rank", "rank"), None),
        (("rank",), None),
        (("rank", "rank", "in"), None),
    ],
)
def test_stacked_axis(shape, axis):
    param = ParamRule("A", tuple(tree.Name(each) for each in shape), (), ())
    assert stacked_axis(param) == axis
