"""insert-delta, and the way to W and back, at weights that are stored as no matrix or used outside their module."""

import pytest
import torch
from torch.testing import assert_close

from peftc.passes.expression.materialise import to_logical, to_stored
from peftc.passes.expression.scene import Eager
from peftc.passes.insert.insert_delta import InsertDelta
from peftc.passes.ir import pass_manager
from peftc.passes.optimize.clean import Clean
from peftc.passes.plan.site import Site

CONV2D = Site("m", "weight", "conv2d", 4, 12, kernel=(3, 2))
PROJECTIONS = ["own.in_proj_weight", "own.out_proj", "other.in_proj_weight", "other.out_proj"]


def adapted(lab, name, spec, training=False):
    active = lab.active(name, spec)
    graph = lab.graph(name, training)
    insert = InsertDelta(active.structure, active.slot_value, training)
    made = pass_manager.run(graph, [Clean(), insert]).changes["insert-delta"].made
    return graph, active, insert, made


def test_a_convolutions_weight_is_one_row_for_each_output_channel():
    stored = torch.randn(4, 2, 3, 2)
    logical = to_logical(Eager(), stored, CONV2D)
    assert torch.equal(logical, stored.flatten(1))
    assert torch.equal(to_stored(Eager(), logical, CONV2D), stored)


def test_golden_at_a_convolution(lab, golden):
    graph, *_ = adapted(lab, "Scan", "adapter a = lora(rank = 2, alpha = 6) { on grouped }")
    golden("passes/plan/insert_delta_convolution.txt", lab.show(graph))


def test_golden_at_a_convolution_while_training(lab, golden):
    graph, *_ = adapted(lab, "Scan", "adapter a = lora(rank = 2, dropout = 0.5) { on strided }", training=True)
    golden("passes/plan/insert_delta_convolution_training.txt", lab.show(graph))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("site", ["strided", "grouped", "line", "solid"])
@pytest.mark.parametrize("method", ["lora(rank = 2, alpha = 6)", "loha(rank = 2)", "hira(rank = 2)"])
def test_numbers_at_convolutions(method, site, training, lab):
    graph, active, *_ = adapted(lab, "Scan", f"adapter a = {method} {{ on {site} }}", training)
    x, model, name = torch.randn(2, 3, 9, 8), lab.model("Scan", training), f"{site}.weight"
    tensors = {name: each.detach() for name, each in lab.tensors("Scan", training).items()}
    weight = tensors[name].flatten(1)
    match method[:4]:
        case "lora":
            weight = weight + active.delta(0, site, 3.0)
        case "hira":
            weight = weight + weight * active.delta(0, site, 1.0)
        case "loha":
            a, b, c, d = (active.tensor(0, site, role) for role in ("w1_a", "w1_b", "w2_a", "w2_b"))
            weight = weight + 4.0 * (a @ b) * (c @ d)
    changed = tensors | {name: weight.view_as(tensors[name])}
    expected = torch.func.functional_call(model, changed, (x,))
    got = lab.run(graph, tensors | active.tensors, x)
    assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):
        assert_close(got, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0, 1e-9])
@pytest.mark.parametrize("site", ["grouped", "solid"])
def test_the_bias_at_a_convolution(site, dropout, training, lab):
    spec = f"adapter a = lora(rank = 2, alpha = 6, bias = true, dropout = {dropout:.9f}) {{ on {site} }}"
    graph, active, *_ = adapted(lab, "Scan", spec, training)
    x, model = torch.randn(2, 3, 9, 8), lab.model("Scan", training)
    tensors = {name: each.detach() for name, each in lab.tensors("Scan", training).items()}
    weight, bias = tensors[f"{site}.weight"], tensors[f"{site}.bias"]
    changed = tensors | {
        f"{site}.weight": weight + active.delta(0, site, 3.0).view_as(weight),
        f"{site}.bias": bias + 3.0 * active.tensor(0, site, "c"),
    }
    expected = torch.func.functional_call(model, changed, (x,))
    assert_close(lab.run(graph, tensors | active.tensors, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("site", PROJECTIONS)
def test_numbers_at_a_multihead_attention(site, training, lab):
    graph, active, *_ = adapted(lab, "Packed", f"adapter a = lora(rank = 2) {{ on {site} }}", training)
    inputs, model = (torch.randn(2, 5, 8), torch.randn(2, 3, 8)), lab.model("Packed", training)
    tensors = {name: each.detach() for name, each in lab.tensors("Packed", training).items()}
    name = active.structure.sites[0].site.weight
    changed = tensors | {name: tensors[name] + active.delta(0, site, 4.0)}
    expected = torch.func.functional_call(model, changed, inputs)
    got = lab.run(graph, tensors | active.tensors, *inputs)
    assert_close(got, expected)
    with pytest.raises(AssertionError):
        assert_close(got, model(*inputs))


def test_the_bias_of_packed_projections(lab):
    spec = "adapter a = lora(rank = 2, alpha = 6, bias = true) { on own }"
    graph, active, *_ = adapted(lab, "Packed", spec)
    inputs, model = (torch.randn(2, 5, 8), torch.randn(2, 3, 8)), lab.model("Packed")
    tensors = {name: each.detach() for name, each in lab.tensors("Packed").items()}
    changed = dict(tensors)
    for site, weight, bias in (
        ("own.in_proj_weight", "own.in_proj_weight", "own.in_proj_bias"),
        ("own.out_proj", "own.out_proj.weight", "own.out_proj.bias"),
    ):
        changed[weight] = tensors[weight] + active.delta(0, site, 3.0)
        changed[bias] = tensors[bias] + 3.0 * active.tensor(0, site, "c")
    expected = torch.func.functional_call(model, changed, inputs)
    assert_close(lab.run(graph, tensors | active.tensors, *inputs), expected)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("Scan", "adapter a = lora(rank = 2) { on all conv2d, line, solid }"),
        ("Packed", "adapter a = lora(rank = 2) { on own, other }"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_twice_is_once(training, name, spec, lab):
    graph, _, insert, made = adapted(lab, name, spec, training)
    assert made
    once = lab.show(graph)
    assert insert.run(graph).made == 0
    assert lab.show(graph) == once
