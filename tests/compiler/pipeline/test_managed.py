import pytest
import torch
from torch import nn

from peftc import compiler
from peftc.compiler.pipeline import managed
from peftc.passes.ir.pass_manager import Refusal
from peftc.passes.ir.verify import VerifyError
from peftc.passes.optimize.clean import Clean
from peftc.passes.optimize.native import NativeCalls
from peftc.runtime.execution.call import read_call

X = torch.ones(2, 3, 4)
PASSES = ["clean", "insert-delta", "stop-early", "lower-quantized"]


class Odd(nn.Linear):
    """A linear that does not call the operator of that name."""

    def forward(self, x):
        return x @ self.weight.T


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd, self.linear = Odd(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.odd(self.linear(x))


@pytest.fixture(scope="module")
def engine():
    return compiler.apply(Net(), "adapter a = lora(rank = 2) { on odd, linear }").eval()._adapter_state.engine


@pytest.fixture
def call():
    return read_call("", False, None, {"x": X})


def test_graphs_are_written_after_each_pass_where_asked(engine, call, tmp_path):
    engine.traced(call)
    with managed.dump_graphs(tmp_path / "graphs"):
        engine.graph(call)
    engine.graph(call)
    files = sorted((tmp_path / "graphs").iterdir())
    assert [file.name for file in files] == [f"{number:04}-{name}.txt" for number, name in enumerate(PASSES)]
    text = files[1].read_text().splitlines()
    assert text[:2] == ["# clean(keep_casts=False)", "# insert-delta(training=False, dense={})   <- after this"]
    assert any(
        "aten.linear.default" in line and "float32[" in line and "made_by='insert-delta'" in line for line in text
    )
    assert "insert-delta'" not in files[0].read_text()


def test_the_environment_asks_too(engine, call, tmp_path, monkeypatch):
    engine.traced(call)
    monkeypatch.setenv(managed.DUMP, str(tmp_path))
    engine.graph(call)
    engine.graph(call)
    assert [file.name for file in sorted(tmp_path.iterdir())][-1] == f"{2 * len(PASSES) - 1:04}-{PASSES[-1]}.txt"


def broken(engine, call):
    """A graph whose value was changed behind the marks."""
    graph = managed.run(engine.graph(call), [Clean()]).subject
    node = next(iter(graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)))
    with node.meta["val"].fake_mode:
        node.meta["val"] = node.meta["val"].clone()
    managed.run(graph, [Clean()])
    node.meta["val"].transpose_(0, 1)
    return graph


def test_a_graph_that_is_broken_is_written_too(engine, call, tmp_path, monkeypatch):
    monkeypatch.delenv(managed.VERIFY, raising=False)
    graph = broken(engine, call)
    managed.run(graph, [Clean()])
    monkeypatch.setenv(managed.VERIFY, "full")
    with managed.dump_graphs(tmp_path), pytest.raises(VerifyError, match="after pass 'clean'"):
        managed.run(graph, [Clean(), NativeCalls()])
    assert [file.name for file in tmp_path.iterdir()] == ["0000-clean.txt"]


def test_refusals_are_gathered(engine, call):
    with managed.gathered_refusals() as gathered:
        engine.graph(call)
    assert gathered
    assert (
        Refusal("insert-delta", "odd", next(iter(gathered)).node, "the weight is used by aten.numpy_T.default")
        in gathered
    )
    with managed.gathered_refusals() as again:
        pass
    assert again == {}
