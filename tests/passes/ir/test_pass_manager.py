from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx

from peftc.passes.insert.insert_delta import InsertDelta
from peftc.passes.ir import pass_manager
from peftc.passes.ir.emit import Origin
from peftc.passes.ir.pass_manager import Change, Miss, Refusal
from peftc.passes.ir.stages import Stage
from peftc.passes.ir.verify import VerifyError
from peftc.passes.optimize.clean import Clean
from peftc.passes.optimize.hoist import Hoist
from peftc.passes.optimize.native import NativeCalls

aten = torch.ops.aten


@dataclass(frozen=True)
class Broken:
    """x  ->  what a pass must not leave behind"""

    how: str
    name: ClassVar[str] = "broken"
    leaves: ClassVar[Stage] = Stage.CLEANED

    def run(self, graph: fx.Graph) -> Change:
        node = next(each for each in graph.nodes if each.op == "call_function")
        with graph.inserting_after(node):
            made = graph.call_function(aten.relu.default, (node,))
        made.meta["val"] = node.meta["val"]
        match self.how:
            case "value":
                del made.meta["val"]
            case "origin":
                made.meta["peftc"] = "me"
            case "order":
                made.args = (graph.output_node().prev,)
            case "operator":
                made.target = torch.relu
            case "shape":
                with node.meta["val"].fake_mode:
                    made.meta["val"] = torch.empty(7)
            case "operand":
                made.target = aten.embedding.default
                made.args = (node, node)
        return Change(made=1, misses=(Miss("it is broken", made), Miss("it is broken", made)))

    def removes(self, node: fx.Node) -> bool:
        return self.how == "left" and node.target is aten.relu.default


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("value", "has no value"),
        ("origin", "does not say who made it"),
        ("operator", "calls .*relu.*, which is not legal in a graph that is cleaned"),
        ("order", "used before it has been defined"),
        ("shape", r"node relu_default holds float32\[7\] on cpu, but aten.relu.default gives float32\[.*, 6\] on cpu"),
        ("operand", "node relu_default calls aten.embedding.default with what it does not take: "),
        ("left", r"node relu_default \(aten.relu.default\) is what this pass removes"),
    ],
)
def test_the_pass_that_broke_the_graph_is_named(how, problem, lab):
    with pytest.raises(VerifyError, match=f"after pass 'broken': .*{problem}") as caught:
        pass_manager.run(lab.graph("Two"), [Clean(), Broken(how), NativeCalls()])
    assert caught.value.after == "broken"
    assert "aten.linear" in caught.value.graph


def test_a_pass_that_breaks_nothing_is_counted_and_what_it_refuses_is_kept_once(lab):
    graph = lab.graph("Two")
    result = pass_manager.run(graph, [Clean(), Broken("not at all"), NativeCalls()])
    assert result.subject is graph
    assert list(result.changes) == ["clean", "broken", "native-calls"]
    assert result.changes["broken"].made == 1
    assert result.refusals == (Refusal("broken", "", "relu_default", "it is broken"),)


def test_a_refusal_says_the_site(lab):
    graph = lab.graph("Two")
    node = next(each for each in graph.nodes if each.op == "call_function")
    node.meta["peftc"] = Origin("some-pass", "model.q")

    @dataclass(frozen=True)
    class Refusing(Broken):
        def run(self, graph: fx.Graph) -> Change:
            return Change(misses=(Miss("no", node),))

    assert pass_manager.run(graph, [Refusing("")]).refusals == (Refusal("broken", "model.q", node.name, "no"),)


def test_what_is_taken_out_is_verified_too(lab):
    @dataclass(frozen=True)
    class Taking(Broken):
        def run(self, graph: fx.Graph) -> Change:
            taken = lab.graph("Two")
            Broken("shape").run(taken)
            return Change(prologue=taken)

    with pytest.raises(VerifyError, match="after pass 'broken': node relu_default holds"):
        pass_manager.run(lab.graph("Two"), [Taking("")])


def test_no_pass_no_change(lab):
    graph = lab.graph("Two")
    before = lab.show(graph)
    assert pass_manager.run(graph, []).changes == {}
    assert lab.show(graph) == before


def test_whoever_watches_sees_the_graph_after_each_pass(lab):
    seen = []
    pass_manager.run(
        lab.graph("Two"), [Clean(), NativeCalls()], watch=lambda name, graph: seen.append((name, lab.show(graph)))
    )
    assert [name for name, _ in seen] == ["clean", "native-calls"]
    assert "aten.linear" in seen[0][1]
    assert "aten.linear" not in seen[1][1]


def test_what_changed_behind_the_marks_is_found_in_full(lab):
    """A value that is written to in place is the object it was."""
    graph = lab.graph("Two")
    node = next(each for each in graph.nodes if each.op == "call_function")
    with node.meta["val"].fake_mode:
        node.meta["val"] = node.meta["val"].clone()  # the trace's own is other tests' too
    pass_manager.run(graph, [Clean()])
    node.meta["val"].transpose_(0, 2)
    pass_manager.run(graph, [Clean()])
    with pytest.raises(VerifyError, match=f"after pass 'clean': node {node} holds"):
        pass_manager.run(graph, [Clean()], full=True)


def test_a_pipeline_prints(lab):
    active = lab.active("Two", "adapter a = lora(rank = 2) { on first }")
    pipeline = [Clean(), InsertDelta(active.structure, active.slot_value, False), Hoist(frozenset({"b", "a"}))]
    assert pass_manager.text(pipeline) == (
        "clean(keep_casts=False)\ninsert-delta(training=False, dense={})\nhoist(transient={'a', 'b'})"
    )
