"""How much of an adapter each token takes, in graphs: numbers against a formula, and what has no token's part."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from peftc.passes.insert.gate import is_disordered, misfit, tokens_of
from peftc.passes.insert.insert_delta import InsertDelta, UnfitError
from peftc.passes.ir import pass_manager
from peftc.passes.optimize.clean import Clean
from peftc.passes.plan.structure import GATE, site_slot

BOTH = ("adapter a = lora(rank = 2, alpha = 6) { on first }", "adapter b = lora(rank = 3, alpha = 3) { on all linear }")


def gated(lab, name, *specs, positions=(0, 1)):
    active, graph = lab.active(name, *specs), lab.graph(name)
    structure = replace(active.structure, gated=frozenset(positions))
    pass_manager.run(graph, [Clean(), InsertDelta(structure, active.slot_value, False)])
    return graph, active


@pytest.mark.parametrize("sizes", [(3, 2, 1), (3, 1, 1)])
@pytest.mark.parametrize("positions", [(0, 1), (1,)])
def test_numbers(lab, sizes, positions):
    graph, active = gated(lab, "Two", *BOTH, positions=positions)
    x, model = torch.randn(3, 2, 4), lab.model("Two")
    gates = [torch.rand(sizes) if each in positions else torch.ones(sizes) for each in range(2)]
    slots = {
        f"{site_slot(place, site)}.{GATE}": gates[place]
        for place, site in ((0, "first"), (1, "first"), (1, "second"))
        if place in positions
    }
    first = model.first(x) + gates[0] * (x @ active.delta(0, "first", 3.0).T)
    first = torch.relu(first + gates[1] * (x @ active.delta(1, "first", 1.0).T))
    expected = model.second(first) + gates[1] * (first @ active.delta(1, "second", 1.0).T)
    got = lab.run(graph, lab.tensors("Two") | active.tensors | slots, x)
    assert_close(got, expected)
    with pytest.raises(AssertionError):  # each token has its own
        assert_close(
            lab.run(graph, lab.tensors("Two") | active.tensors | {k: v.flip(0) for k, v in slots.items()}, x), got
        )


def test_a_weight_that_meets_no_token(lab):
    with pytest.raises(UnfitError, match="differs from token to token, and the weight is used by"):
        gated(lab, "Lookup", "adapter a = lora(rank = 2) { on bag.table }", positions=(0,))


def test_sizes_and_orders():
    """What has one part for each token, and whether these lie as the rows do."""

    class Turns(torch.nn.Module):
        def forward(self, x):
            flat, turned = x.reshape(-1, 4), x.transpose(0, 1)
            return x + 1, flat + 1, turned + 1, turned.reshape(-1, 4) + 1, x.sum(1)

    graph = torch.export.export(Turns(), (torch.randn(3, 2, 4),)).graph
    (outputs,) = graph.output_node().args
    tokens = tokens_of(graph)
    assert [bool(misfit(each, tokens)) for each in outputs] == [False, False, True, False, True]
    assert [is_disordered(each, tokens) for each in outputs[:4]] == [False, False, True, True]
