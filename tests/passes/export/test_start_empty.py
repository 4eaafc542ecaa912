import pytest
import torch
from torch import fx, nn
from torch.testing import assert_close

from peftc.passes.export.start_empty import StartEmpty
from peftc.passes.ir import pass_manager
from peftc.passes.ir.inputs import InputSpec
from tests.passes.export.lifted import BATCH, PAST, SEQUENCE, X, lifted

aten = torch.ops.aten
CACHE = InputSpec("past_0_key", axes=(("batch",), 2, ("past",), 4))
START = StartEmpty(("past_0_key", "past_0_value"), "x")


def appended(call, inputs, held):
    x, cache = inputs
    heads = call(aten.expand.default, (call(aten.unsqueeze.default, (x, 1)), [-1, 2, -1, -1]))
    return call(aten.cat.default, ([cache, heads], 2))


def graph():
    return lifted(appended, {}, X, CACHE, dimensions=(BATCH, SEQUENCE, PAST)).graph


def test_law():
    made = graph()
    change = pass_manager.run(made, [START]).changes["start-empty"]
    assert (change.made, change.removed) == (2, 1)
    assert [str(node.target) for node in made.find_nodes(op="placeholder")] == ["x"]


@pytest.mark.parametrize("rows", [1, 3])
def test_numbers(rows):
    before, after = graph(), graph()
    pass_manager.run(after, [START])
    x = torch.randn(rows, 2, 4)
    (found,) = fx.GraphModule(nn.Module(), after)(x)
    (expected,) = fx.GraphModule(nn.Module(), before)(x, torch.zeros(rows, 2, 0, 4))
    assert_close(found, expected)
    assert found.shape == (rows, 2, 2, 4)


def test_twice_is_once():
    made = graph()
    pass_manager.run(made, [START])
    before = str(made)
    assert pass_manager.run(made, [START]).changes["start-empty"].made == 0
    assert str(made) == before


def test_a_graph_without_a_past_is_left():
    made = lifted(lambda call, inputs, held: call(aten.relu.default, (inputs[0],)), {}, X).graph
    assert pass_manager.run(made, [START]).changes["start-empty"].made == 0
