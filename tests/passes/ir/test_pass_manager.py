from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx

from peftc.passes.ir import pass_manager
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.verify import VerifyError
from peftc.passes.optimize.clean import Clean
from peftc.passes.optimize.native import NativeCalls

aten = torch.ops.aten


@dataclass(frozen=True)
class Broken:
    """x  ->  what a pass must not leave behind"""

    how: str
    name: ClassVar[str] = "broken"

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
        return Change(made=1)

    def legal(self, node: fx.Node) -> bool:
        return self.how != "operator" or node.target is not aten.relu.default


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("value", "has no value"),
        ("origin", "does not say who made it"),
        ("operator", "calls aten.relu.default, which is not legal here"),
        ("order", "used before it has been defined"),
    ],
)
def test_the_pass_that_broke_the_graph_is_named(how, problem, lab):
    with pytest.raises(VerifyError, match=f"after pass 'broken': .*{problem}") as caught:
        pass_manager.run(lab.graph("Two"), [Clean(), Broken(how), NativeCalls()])
    assert caught.value.after == "broken"
    assert "aten.linear" in caught.value.graph


def test_a_pass_that_breaks_nothing_is_counted(lab):
    changes = pass_manager.run(lab.graph("Two"), [Clean(), Broken("not at all"), NativeCalls()])
    assert list(changes) == ["clean", "broken", "native-calls"]
    assert changes["broken"] == Change(made=1)


def test_no_pass_no_change(lab):
    graph = lab.graph("Two")
    before = lab.show(graph)
    assert pass_manager.run(graph, []) == {}
    assert lab.show(graph) == before
