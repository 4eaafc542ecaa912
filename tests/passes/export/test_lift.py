import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc.passes.export.lift import BoundError, Dimension
from peftc.passes.ir.inputs import InputSpec
from peftc.passes.ir.roles import Role
from tests.passes.export.lifted import BATCH, PAST, SEQUENCE, X, lifted, operators, run

aten = torch.ops.aten
TENSORS = {"weight": nn.Parameter(torch.randn(6, 4)), "same": nn.Parameter(torch.randn(6))}
CACHE = InputSpec("cache", Role.CACHE, axes=(("batch",), ("past",), 4))


def linear(call, inputs, held):
    return call(aten.linear.default, (inputs[0], held["weight"], held["same"]))


def appended(call, inputs, held):
    return call(aten.cat.default, ([inputs[1], call(aten.linear.default, (inputs[0], held["square"]))], 1))


def test_what_it_reads_stands_in_front_of_the_inputs():
    made = lifted(linear, TENSORS, X)
    assert [node.name for node in made.graph.find_nodes(op="placeholder")] == ["p_weight", "p_same", "x"]
    assert list(made.tensors.values()) == list(TENSORS.values())
    assert operators(made) == ["aten.linear.default"]


@pytest.mark.parametrize("sizes", [(1, 1), (2, 5), (4, 9)])
def test_numbers(sizes):
    x = torch.randn(*sizes, 4)
    found = run(lifted(linear, TENSORS, X), x)
    assert_close(found, nn.functional.linear(x, TENSORS["weight"], TENSORS["same"]).detach())


def test_sizes_have_names():
    tensors = {"square": torch.randn(4, 4)}
    made = lifted(appended, tensors, X, CACHE, dimensions=(BATCH, SEQUENCE, PAST))
    (output,) = made.graph.find_nodes(op="output")
    batch, total, width = output.args[0][0].meta["val"].shape
    assert (made.spelled(batch), made.spelled(total), width) == ("batch", "past + sequence", 4)
    x = torch.randn(2, 1, 4)
    for past in (0, 3):
        cache = torch.randn(2, past, 4)
        assert_close(run(made, x, cache), torch.cat([cache, x @ tensors["square"].T], 1))


def test_tied_tensors_are_one():
    def twice(call, inputs, held):
        return call(aten.linear.default, (call(aten.linear.default, (inputs[0], held["a"])), held["b"]))

    square = torch.randn(4, 4)
    made = lifted(twice, {"a": square, "b": square}, X)
    assert len(made.tensors) == 2, "the name says what is one: `value_of` gives it"


def test_a_graph_of_some_sizes_only_is_refused():
    def bound(call, inputs, held):
        return call(aten.add.Tensor, (inputs[0], held["table"]))

    with pytest.raises(BoundError) as caught:
        lifted(bound, {"table": torch.randn(3, 5, 4)}, X)
    assert any("batch" in each or "sequence" in each for each in caught.value.reasons)


def test_what_nothing_reads_can_be_dropped():
    made = lifted(linear, TENSORS, X, CACHE, dimensions=(BATCH, SEQUENCE, PAST))
    made.drop_inputs(Role.CACHE)
    assert list(made.inputs) == ["x"]
    made.drop_inputs(Role.OTHER)
    assert list(made.inputs) == ["x"], "it is read"


def test_no_more_than_a_few_can_be_said():
    made = lifted(linear, TENSORS, X, dimensions=(Dimension("batch", 3, high=3), SEQUENCE))
    assert run(made, torch.randn(1, 1, 4)).shape == (1, 1, 6)
