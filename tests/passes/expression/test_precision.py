"""Halves: what torch computes in no such type is rounded once, types that meet, and bounds beyond a type's range."""

import math

import pytest
import torch

from peftc.grammar.algebra import algebra as al
from peftc.passes.expression.materialise import Evaluator
from peftc.passes.expression.precision import at_least_float32, together
from peftc.passes.expression.scene import Eager
from peftc.passes.ir.emit import Emit, Origin
from tests.passes.expression.test_functions import CASES, called

HALVES = (torch.float16, torch.bfloat16)

# What torch refuses to do in a half, on the CPU or elsewhere, or makes NaN of.
WIDENED = {
    *("cayley", "common_basis", "expm", "ifft2", "inverse", "left_singular", "qr", "range_basis", "right_singular"),
    "singular_values",
}


def value(key, tensors):
    matrix, names = called(key)
    like = {"like": torch.zeros(1, 1, dtype=next((each.dtype for each in tensors if each.is_floating_point()), None))}
    return Evaluator(Eager(), {**dict(zip(names, tensors, strict=True)), **like}, {}).of(matrix)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("key", [key for key in CASES if CASES[key].shapes], ids=lambda key: " ".join(key).strip())
def test_every_function_of_halves(key, dtype):
    tensors = [each.to(dtype) if each.is_floating_point() else each for each in CASES[key].tensors(0)]
    wide = [each.float() if each.is_floating_point() else each for each in tensors]
    found, exact = value(key, tensors), value(key, wide)
    if not found.is_floating_point() or not any(each.is_floating_point() for each in tensors):
        return
    assert found.dtype == (dtype if exact.dtype == torch.float32 else exact.dtype)
    if key[0] in WIDENED:
        assert torch.equal(found, exact.to(dtype)), "rounded once"
    finite = exact.isfinite()
    assert torch.equal(finite, found.isfinite())
    off = (found[finite].double() - exact[finite].double()).abs().max()
    assert off <= 4 * torch.finfo(dtype).eps * max(1.0, float(exact[finite].abs().max()))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", sorted(WIDENED - {"common_basis"}))
def test_gradients_go_through(name, dtype):
    tensors = [each.to(dtype).requires_grad_() for each in CASES[name, ""].tensors(0)]
    value((name, ""), tensors).sum().backward()
    assert tensors[0].grad is not None
    assert tensors[0].grad.dtype == dtype


@pytest.mark.parametrize(
    ("left", "right", "wider"),
    [
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float16, torch.float16, torch.float16),
    ],
)
def test_a_product_of_two_types_is_of_the_wider(left, right, wider, lab):
    a, b = torch.randn(3, 4, dtype=torch.float64).to(left), torch.randn(4, 2, dtype=torch.float64).to(right)
    matrix = al.Product(al.Param("A"), al.Param("B"))
    found = Evaluator(Eager(), {"A": a, "B": b}, {}).of(matrix)
    assert found.dtype == wider
    assert torch.equal(found, a.to(wider) @ b.to(wider))

    hand = lab.hand()
    nodes = {"A": hand.attribute("A", 3, 4, dtype=left), "B": hand.attribute("B", 4, 2, dtype=right)}
    end = hand.call(torch.ops.aten.relu.default, nodes["A"])
    emit = Emit(hand.graph, end, Origin("test"), like=end)
    node = Evaluator(emit, nodes, {}).of(matrix)
    assert node.meta["val"].dtype == wider
    assert len(emit.made) == 1 + (left != wider) + (right != wider), "no cast where none is needed"


def test_values_of_one_type_are_themselves():
    a, b = torch.ones(2), torch.ones(2)
    assert together(Eager(), a, b) == (a, b)


def test_whole_numbers_stay_so():
    assert at_least_float32(torch.int64) == torch.int64
    assert at_least_float32(torch.float64) == torch.float64
    assert at_least_float32(torch.bfloat16) == torch.float32


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_a_bound_beyond_the_range_bounds_nothing(dtype):
    x = torch.tensor([-math.inf, -3.0, 2.0, 60000.0, math.inf], dtype=dtype)
    found = Evaluator(Eager(), {"P": x}, {}).of(al.Function("clamp", (al.Param("P"),), (-1.0, 1e30)))
    if dtype == torch.float16:
        assert torch.equal(found, x.maximum(torch.tensor(-1.0, dtype=dtype)))
    else:
        assert torch.equal(found, x.clamp(-1.0, 1e30))
    low = Evaluator(Eager(), {"P": x}, {}).of(al.Function("clamp", (al.Param("P"),), (-1e30, 1.0)))
    assert float(low[-1]) == 1.0
    assert float(low[1]) == -3.0
