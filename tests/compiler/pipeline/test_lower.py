import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.compiler.pipeline.lower import copy_graph, lower, specialise
from peftc.grammar.diagnostics import ModelError
from peftc.passes.optimize.clean import is_check
from peftc.passes.optimize.native import NATIVE
from peftc.passes.plan.structure import Structure
from peftc.runtime.execution.call import read_call

X = torch.ones(2, 3, 4)


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        return x @ self.table.T


class Odd(nn.Linear):
    """A linear that does not call the operator of that name."""

    def forward(self, x):
        return x @ self.weight.T


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd = Odd(4, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.bag = Bag()

    def forward(self, x):
        return self.bag(self.odd(self.norm(self.linear(x))).to(torch.float32))


def made(spec, training=False):
    adapted = compiler.apply(Net(), spec).train(training)
    call = read_call("", training, None, {"x": X})
    return adapted, adapted._adapter_state.engine, call


@pytest.fixture(scope="module")
def plain():
    return made("adapter a = lora(rank = 2) { on linear  train norm }")


def makers(graph):
    return {node.meta["peftc"].made_by for node in graph.nodes if "peftc" in node.meta}


def refuse(*_):
    raise AssertionError("no slot is asked for")


def test_specialise_leaves_the_trace_alone(plain):
    _, engine, call = plain
    traced = engine.traced(call)
    before = str(traced.graph)
    graph = engine.graph(call)
    assert str(traced.graph) == before
    assert makers(graph) == {"insert-delta", "insert-copy"}
    assert makers(traced.graph) == set()
    assert not any(is_check(node) for node in graph.nodes)


def test_no_adapter_no_insertion(plain):
    _, engine, call = plain
    graph = specialise(engine.traced(call), Structure(), refuse, training=False, autocast=False)
    assert makers(graph) == set()


def test_autocast_keeps_casts(plain):
    _, engine, call = plain
    counts = []
    for autocast in (False, True):
        graph = specialise(engine.traced(call), Structure(), refuse, training=False, autocast=autocast)
        counts.append(len(graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype)))
    assert counts == [0, 1]


def test_lower_leaves_the_graph_alone(plain):
    _, engine, call = plain
    graph = engine.graph(call)
    before = str(graph)
    forms = lower(graph, autocast=False)
    lowered = forms.plain
    assert str(graph) == before
    assert not any(node.target in NATIVE for node in lowered.nodes)
    assert "fuse-low-rank" not in makers(graph) | makers(forms.traceable)
    assert lowered.find_nodes(op="call_function", target=torch.Tensor.addmm_)


def test_nothing_is_fused_under_autocast(plain):
    _, engine, call = plain
    lowered = lower(engine.graph(call), autocast=True).plain
    assert "fuse-low-rank" not in makers(lowered)


def test_a_copied_graph_is_the_same_and_its_own(plain):
    _, engine, call = plain
    graph = engine.graph(call)
    copied = copy_graph(graph)
    copied.lint()
    assert str(copied) == str(graph)
    assert not set(copied.nodes) & set(graph.nodes)
    for one, two in zip(graph.nodes, copied.nodes, strict=True):
        assert one.meta.get("peftc") == two.meta.get("peftc")
        assert one.meta.get("val") is two.meta.get("val")


def test_dropout_that_cannot_be_honoured():
    adapted, engine, call = made("adapter a = lora(rank = 2, dropout = 0.5) { on odd }", training=True)
    with pytest.raises(ModelError) as caught:
        engine.graph(call)
    (found,) = caught.value.diagnostics
    assert found.code == "E420"
    assert found.message.startswith("dropout cannot be honoured at odd: the weight is used by aten.")
    assert found.help == "set dropout = 0 there"
    adapted.eval()
    assert_close(adapted(X), adapted.bag(adapted.odd(adapted.norm(adapted.linear(X)))))
