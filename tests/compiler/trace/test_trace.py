"""Traces: which calls share one, what they are bound to, and what cannot be traced."""

import pytest
import torch
import transformers as hf
from torch import nn
from torch.testing import assert_close
from transformers import DynamicCache

from peftc.compiler.trace.trace import Tracer
from peftc.grammar.diagnostics import ModelError
from peftc.passes.ir.bodies import module_path
from peftc.runtime.execution.call import read_call

aten = torch.ops.aten


def trace(model, config=None, **arguments):
    return Tracer(model).trace(read_call("", model.training, config or getattr(model, "config", None), arguments))


def ids(rows=2, length=6):
    return torch.randint(1, 40, (rows, length))


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return hf.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def traces(llama):
    """One trace for each kind of call, all made in one process."""
    mask = torch.ones(2, 6, dtype=torch.long)
    cache = DynamicCache(config=llama.config)
    made = {
        "bare": trace(llama, input_ids=ids()),
        "mask": trace(llama, input_ids=ids(), attention_mask=mask),
        "no cache": trace(llama, input_ids=ids(), attention_mask=mask, use_cache=False),
        "cache": trace(llama, input_ids=ids(), attention_mask=mask, past_key_values=cache),
        "labels": trace(llama, input_ids=ids(), labels=ids()),
    }
    assert cache.get_seq_length() == 0  # the caller's cache is not the one that is traced
    return made


PAST = ("past_0_key", "past_0_value")


@pytest.mark.parametrize(
    ("kind", "inputs", "outputs"),
    [
        ("bare", ("input_ids",), 3),
        ("mask", ("attention_mask", "input_ids"), 3),
        ("no cache", ("attention_mask", "input_ids"), 1),
        ("cache", ("attention_mask", "input_ids", *PAST), 3),
        ("labels", ("input_ids", "target_labels"), 4),
    ],
)
def test_inputs_and_outputs(kind, inputs, outputs, traces):
    traced = traces[kind]
    assert tuple(spec.name for spec in traced.inputs) == inputs
    assert [str(node.target) for node in traced.graph.find_nodes(op="placeholder")] == list(inputs)
    assert len(traced.graph.output_node().args[0]) == outputs
    traced.graph.lint()


@pytest.mark.parametrize("kind", ["bare", "mask", "no cache", "labels"])
def test_every_size_of_the_call_may_vary(kind, traces):
    assert all(shape == (None, None) for shape in traces[kind].shapes)


def test_the_sizes_of_a_cache_that_may_vary(traces):
    assert traces["cache"].shapes[2:] == ((None, 2, None, 4), (None, 2, None, 4))
    assert traces["cache"].cache.own[0].heads == 2


def test_nodes_know_their_value_and_their_module(traces):
    graph = traces["mask"].graph
    assert all("val" in node.meta for node in graph.nodes if node.op != "output")
    linears = graph.find_nodes(op="call_function", target=aten.linear.default)
    places = {module_path(node)[-1] for node in linears}
    assert {"lm_head", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"} <= places


def test_weights_are_read_by_their_names(llama, traces):
    names = {name for name, _ in llama.named_parameters()} | {name for name, _ in llama.named_buffers()}
    read = {str(node.target) for node in traces["bare"].graph.find_nodes(op="get_attr")}
    assert {name for name, _ in llama.named_parameters()} <= read
    assert read - names == set(traces["bare"].constants)


def test_the_model_is_left_as_it_was(llama, traces):
    assert "forward" not in vars(llama)
    assert not llama.training
    assert not any(isinstance(each, torch._subclasses.FakeTensor) for each in llama.parameters())
    assert all(each.requires_grad for each in llama.parameters())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.norm(self.linear(x)))


def calls(traced):
    return [node.target for node in traced.graph.nodes if node.op == "call_function"]


def test_training_is_traced_as_training():
    model = Net()
    trained, evaluated = trace(model.train(), x=torch.zeros(2, 4)), trace(model.eval(), x=torch.zeros(2, 4))
    assert aten.dropout.default in calls(trained)
    flags = [node.args[2] for node in trained.graph.find_nodes(op="call_function", target=aten.dropout.default)]
    assert flags == [True]
    assert calls(trained) != calls(evaluated)
    assert model.norm.num_batches_tracked == 0


def test_again_and_again_in_one_process():
    """A FakeTensorMode that saw one export crashed the process at another."""
    model = Net().eval()
    tracer = Tracer(model)
    texts = {
        str(tracer.trace(read_call("", False, None, {"x": torch.zeros(rows, 4)})).graph) for rows in (2, 3, 7, 1, 2)
    }
    assert len(texts) == 1


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        raise KeyError("no such thing")


@pytest.mark.parametrize(("kind", "cause"), [(DataDependent, "GuardOnDataDependentSymNode"), (Raises, "KeyError")])
def test_what_cannot_be_traced(kind, cause):
    model = kind().eval()
    before = dict(vars(model))
    with pytest.raises(ModelError) as caught:
        trace(model, x=torch.zeros(2, 4))
    (found,) = caught.value.diagnostics
    assert found.code == "E402"
    assert found.message.startswith(f"{kind.__name__} cannot be traced for this call: {cause}: ")
    assert caught.value.__cause__ is not None
    assert vars(model) == before
    assert "forward" not in vars(model)


def test_a_cache_for_a_model_that_returns_none():
    class Ignores(nn.Module):
        def forward(self, x, past=None):
            return x * 2

    with pytest.raises(ModelError, match=r"E411.*Ignores was given a cache but returns none"):
        trace(Ignores().eval(), x=torch.zeros(2, 4), past=DynamicCache())


class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] > 3 else x


def test_what_a_branch_on_sizes_asked_is_a_guard():
    small, large = (trace(Branch().eval(), x=torch.zeros(rows, 4)).guards for rows in (2, 5))
    assert small
    assert all(eval(each, {"sizes": [(3, 4)]}) for each in small)
    assert not all(eval(each, {"sizes": [(4, 4)]}) for each in small)
    assert large != small
    assert trace(Net().eval(), x=torch.zeros(2, 4)).guards in ((), ("sizes[0][1] == 4",))


def test_constants_of_the_trace():
    class Constant(nn.Module):
        def forward(self, x):
            return x + torch.tensor([1.0, 2.0])

    traced = trace(Constant().eval(), x=torch.zeros(3, 2))
    (value,) = traced.constants.values()
    assert_close(value, torch.tensor([1.0, 2.0]))
