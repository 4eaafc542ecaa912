import io

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc.passes.export.exported import exported_program
from peftc.passes.export.lift import Dimension
from peftc.passes.ir.inputs import InputSpec
from tests.passes.export.lifted import SEQUENCE, X, lifted

aten = torch.ops.aten
TENSORS = {"weight": nn.Parameter(torch.randn(6, 4)), "A": torch.randn(2, 4), "B": torch.randn(6, 2)}
SCALE = InputSpec("scale", axes=(("batch",),))


def compute(call, inputs, held):
    """(x W^T + x A^T B^T) and the scale, doubled"""
    thin = call(aten.linear.default, (call(aten.linear.default, (inputs[0], held["A"])), held["B"]))
    made = call(aten.add.Tensor, (call(aten.linear.default, (inputs[0], held["weight"])), thin))
    return made, call(aten.mul.Tensor, (inputs[1], 2.0))


def program(adapter: bool, high: int | None = None):
    made = lifted(compute, TENSORS, X, SCALE, dimensions=(Dimension("batch", 3, high=high), SEQUENCE))
    slots = {name: node for node, name in made.names.items() if name in "AB"} if adapter else {}
    made.move_to_inputs({f"adapter.{name}": node for name, node in slots.items()})
    return exported_program(made, ("logits", "doubled"), "adapter", slots)


def reloaded(made):
    file = io.BytesIO()
    torch.export.save(made, file)
    file.seek(0)
    return torch.export.load(file)


def expected(x, a, b):
    return x @ TENSORS["weight"].detach().T + x @ a.T @ b.T


@pytest.mark.parametrize("sizes", [(1, 1), (2, 5)])
def test_numbers(sizes):
    """Given by name, in any order; saved and loaded."""
    x, scale = torch.randn(*sizes, 4), torch.randn(sizes[0])
    found = reloaded(program(False)).module()(scale=scale, x=x)
    assert list(found) == ["logits", "doubled"]
    assert_close(found["logits"], expected(x, TENSORS["A"], TENSORS["B"]))
    assert_close(found["doubled"], 2 * scale)


def test_an_adapter_is_a_dictionary():
    module = reloaded(program(True)).module()
    x, scale = torch.randn(2, 3, 4), torch.randn(2)
    for seed in range(2):
        torch.manual_seed(seed)
        a, b = torch.randn(2, 4), torch.randn(6, 2)
        found = module(x=x, scale=scale, adapter={"A": a, "B": b})["logits"]
        assert_close(found, expected(x, a, b))
    with pytest.raises(AssertionError):
        assert_close(found, expected(x, TENSORS["A"], TENSORS["B"]))


def test_what_it_holds():
    made = program(True)
    assert list(made.state_dict) == ["weight"]
    assert isinstance(made.state_dict["weight"], nn.Parameter)
    assert {node.name for node in made.graph.nodes if set(node.meta) - {"val"}} == set(), (
        "no paths of ours travel along"
    )
    assert set(program(False).state_dict) == {"weight", "A", "B"}


def test_ranges_are_kept():
    """What is above them is refused by torch itself."""
    module = reloaded(program(False, high=8)).module()
    assert module(x=torch.randn(8, 1, 4), scale=torch.randn(8))["logits"].shape == (8, 1, 6)
    with pytest.raises(AssertionError, match="<= 8"):
        module(x=torch.randn(9, 1, 4), scale=torch.randn(9))
    with pytest.raises(ValueError, match="mismatch"):
        module(x=torch.randn(2, 1, 4))
