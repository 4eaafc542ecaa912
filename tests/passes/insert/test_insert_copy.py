from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from peftc.passes.insert.insert_copy import InsertCopy
from peftc.passes.ir import pass_manager
from peftc.passes.optimize.clean import Clean

SPEC = "adapter a = lora(rank = 2) { on second  train first }"


def copied(lab, spec=SPEC):
    active = lab.active("Two", spec)
    graph = lab.graph("Two")
    insert = InsertCopy(active.structure)
    change = pass_manager.run(graph, [Clean(), insert]).changes["insert-copy"]
    return graph, active, insert, change


def test_golden(lab, golden):
    graph, _, _, change = copied(lab)
    assert change.made == 2
    golden("passes/insert/insert_copy.txt", lab.show(graph))


def test_numbers(lab):
    graph, active, *_ = copied(lab)
    x, model = torch.randn(3, 2, 4), lab.model("Two")
    weight, bias = active.tensors["copies.p0__first.weight"], active.tensors["copies.p0__first.bias"]
    got = lab.run(graph, lab.tensors("Two") | active.tensors, x)
    assert_close(got, torch.relu(x @ weight.T + bias) @ model.second.weight.T)
    with pytest.raises(AssertionError):
        assert_close(got, model(x))


def test_twice_is_once(lab):
    graph, _, insert, _ = copied(lab)
    once = lab.show(graph)
    assert insert.run(graph).made == 0
    assert lab.show(graph) == once


def test_what_is_gone_afterwards(lab):
    active = lab.active("Two", SPEC)
    insert = InsertCopy(active.structure)
    reads = {str(node.target): insert.removes(node) for node in lab.graph("Two").find_nodes(op="get_attr")}
    assert reads == {"first.weight": True, "first.bias": True, "second.weight": False}


def test_biases_alone(lab):
    graph, *_ = copied(lab, "adapter a = lora(rank = 2) { on first  bias adapter }")
    read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    assert read == {"first.weight", "copies.p0__first.bias", "second.weight"}


def test_a_copy_in_another_type(lab):
    active = lab.active("Two", SPEC)
    copies = tuple(replace(each, dtype=torch.float64) for each in active.structure.copies)
    graph = lab.graph("Two")
    InsertCopy(replace(active.structure, copies=copies)).run(graph)
    own = [node for node in graph.find_nodes(op="get_attr") if str(node.target).startswith("copies.")]
    assert {node.meta["val"].dtype for node in own} == {torch.float64}
