"""Stamped traces: node for node those in full, and layers that do more than compute traced by themselves."""

import random

import pytest
import torch
import transformers as hf
from torch import fx, nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree
from transformers import DynamicCache

from peftc.compiler.pipeline import managed
from peftc.compiler.trace import trace as tracing
from peftc.compiler.trace.expand import check_stamps
from peftc.compiler.trace.stamp import Body
from peftc.compiler.trace.trace import Tracer
from peftc.grammar.diagnostics import ModelError
from peftc.passes.ir.bodies import module_path
from peftc.passes.ir.verify import VerifyError
from peftc.passes.optimize.clean import Clean
from peftc.passes.plan.sites import tied_names
from peftc.runtime.execution.call import read_call
from tests import zoo

WIDTH = 4


def trace(model, **arguments):
    return Tracer(model).trace(read_call("", model.training, getattr(model, "config", None), arguments))


def in_full(model, **arguments):
    """The trace with every layer's own nodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "repeated_layers", lambda model: {})
        traced = trace(model, **arguments)
    assert not traced.stamped
    return traced


def lines(traced):
    """A graph as text: operators, operands, what they give and where they are. A copy: identities are taken out.

    Constants of the trace have no names here: layers alike share theirs.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    managed.run(graph, [Clean()])
    names = {node: f"%{at}" for at, node in enumerate(each for each in graph.nodes if each.op != "get_attr")}
    for node in graph.find_nodes(op="get_attr"):
        names[node] = "constant" if str(node.target) in traced.constants else str(node.target)

    def shown(value):
        if isinstance(value, torch.Tensor):
            return f"{value.dtype}{list(map(str, value.shape))}"
        return str(value)

    found = []
    for node in graph.nodes:
        if node.op != "get_attr":
            operands = fx.map_arg((node.args, node.kwargs), lambda each: Name(names[each]))
            given = list(map(shown, pytree.tree_leaves(node.meta.get("val"))))
            found.append(f"{names[node]} = {node.op} {node.target} {operands} {given} {module_path(node)}")
    return found


class Name:
    """A node's name among operands."""

    def __init__(self, text):
        self.text = text

    def __repr__(self):
        return self.text


IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
GEMMA = dict(**{**zoo.DECODER, "num_hidden_layers": 6}, head_dim=8, sliding_window=4)


def of_zoo(name, **fields):
    return lambda: zoo.make(name, **fields)


def gemma():
    kinds = ["sliding_attention", "full_attention"] * 3
    torch.manual_seed(0)
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA, layer_types=kinds)).eval()


CASES = {
    "training": (of_zoo("llama", num_hidden_layers=3), dict(labels=IDS), 2),
    "gpt2": (of_zoo("gpt2", n_layer=3), dict(attention_mask=MASK), 2),
    "a cache": (of_zoo("mistral", num_hidden_layers=3), dict(attention_mask=MASK, past_key_values=None), 2),
    "layers of two kinds": (gemma, dict(attention_mask=MASK), 4),
    "an encoder and a decoder": (of_zoo("t5", num_layers=3), dict(decoder_input_ids=IDS), 2),
    "experts, and their routers' scores": (of_zoo("moe", num_hidden_layers=3), dict(output_router_logits=True), 2),
    "hidden states and attentions": (
        of_zoo("llama", num_hidden_layers=3, attn_implementation="eager"),
        dict(output_hidden_states=True, output_attentions=True),
        2,
    ),
    "an encoder": (of_zoo("bert", num_hidden_layers=3), dict(attention_mask=MASK), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stamped_trace_is_that_in_full(case):
    make, arguments, stamped = CASES[case]
    model = make().train(case == "training")
    if "past_key_values" in arguments:
        arguments = dict(arguments, past_key_values=DynamicCache(config=model.config))
    one, other = trace(model, input_ids=IDS, **arguments), in_full(model, input_ids=IDS, **arguments)
    assert len(one.stamped) == stamped
    assert not one.alone
    assert lines(one) == lines(other)
    assert one.inputs == other.inputs
    assert one.outputs == other.outputs
    assert "forward" not in vars(model)


# Stacks of layers of our own: what a layer may do, and what tells that it has more to it than nodes.


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.inner(x).relu()


class Stack(nn.Module):
    def __init__(self, kind=Layer, count=4):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(kind() for _ in range(count))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))


def run(traced, model, *tensors):
    """What a graph gives, with the model's tensors."""
    return fx.GraphModule(model, traced.graph)(*tensors)


def check(model, stamped, **arguments):
    """Compare a stamped trace with the model and with that in full."""
    arguments = arguments or {"x": X}
    one, other = trace(model, **arguments), in_full(model, **arguments)
    assert set(one.stamped) == set(stamped)
    assert lines(one) == lines(other)
    return one


LATER = ["layers.1", "layers.2", "layers.3"]


def test_a_stack():
    model = Stack().eval()
    one = check(model, LATER)
    assert set(one.stamped.values()) == {"layers.0"}
    (given,) = run(one, model, X)
    assert torch.equal(given, model(X))


def test_layers_with_other_attributes_are_no_layers_alike():
    model = Stack().eval()
    model.layers[2].factor = 2
    check(model, ["layers.1", "layers.3"])


def test_layers_in_layers():
    class Outer(Layer):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x) + self.inner(x)
            return x

    model = Stack(Outer).eval()
    one = check(model, ["layers.0.layers.1", *LATER])
    (given,) = run(one, model, X)
    assert torch.equal(given, model(X))


def test_calls_of_other_forms_are_traced_apart():
    class Other(Layer):
        def forward(self, x, scale=1.0, bias=None, twice=False):
            x = self.inner(x) * scale
            return x if bias is None else x + bias

    class Calls(Stack):
        def forward(self, x):
            first, second, third, last = self.layers
            x = first(x)
            x = second(x, 2.0)
            x = third(x, bias=self.head(x))
            return last(x, 2.0)

    model = Calls(Other).eval()
    one = check(model, ["layers.3"])
    assert one.stamped == {"layers.3": "layers.1"}
    (given,) = run(one, model, X)
    assert torch.equal(given, model(X))


def test_one_tensor_given_twice_is_another_form():
    class Sums(Layer):
        def forward(self, x, y):
            return self.inner(x) if x is y else self.inner(x) + y

    class Calls(Stack):
        def forward(self, x):
            first, second, third, last = self.layers
            y = first(x, x)
            y = second(x, y)
            y = third(y, y)
            return last(x, y)

    model = Calls(Sums).eval()
    one = check(model, ["layers.2", "layers.3"])
    assert one.stamped == {"layers.2": "layers.0", "layers.3": "layers.1"}


def test_nested_outputs_and_inputs_that_come_back():
    class Nested(Layer):
        def forward(self, pair):
            x, y = pair["x"], pair["y"]
            return {"x": self.inner(x), "y": y}

    class Calls(Stack):
        def forward(self, x):
            pair = {"x": x, "y": x * 2}
            for layer in self.layers:
                pair = layer(pair)
            return pair["x"] + pair["y"]

    model = Calls(Nested).eval()
    one = check(model, LATER)
    (given,) = run(one, model, X)
    assert torch.equal(given, model(X))


def test_a_layer_that_is_called_again_reads_its_own():
    class Calls(Stack):
        def forward(self, x):
            for layer in (*self.layers, self.layers[2]):
                x = layer(x)
            return self.head(x)

    model = Calls().eval()
    one = check(model, LATER)
    (given,) = run(one, model, X)
    assert torch.equal(given, model(X))


def test_tied_weights_stay_each_layers_own():
    model = Stack().eval()
    model.layers[1].inner.weight = model.head.weight
    model.layers[3].inner.weight = model.layers[0].inner.weight
    one = check(model, LATER)
    (given,) = run(one, model, X)
    assert torch.equal(given, model(X))
    read = {
        module_path(user)[-1]: str(node.target) for node in one.graph.find_nodes(op="get_attr") for user in node.users
    }
    assert all(read[f"layers.{at}.inner"].startswith(f"layers.{at}.inner.") for at in range(4))


def test_hooks_inside_of_layers_see_every_layers_values():
    seen = []
    model = Stack().eval()
    for layer in model.layers:
        layer.inner.register_forward_hook(lambda module, args, output: seen.append(output))

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            seen.clear()
            return self.model(x), *seen

    whole = Seen().eval()
    one = check(whole, [f"model.{each}" for each in LATER])
    for given, expected in zip(run(one, whole, X), whole(X), strict=True):
        assert torch.equal(given, expected)


class Keeps(Layer):
    def forward(self, x):
        self.kept = 1
        return self.inner(x)


class Lists(Layer):
    def __init__(self):
        super().__init__()
        self.kept = []

    def forward(self, x):
        self.kept.append(1)
        return self.inner(x)


class Draws(Layer):
    def forward(self, x):
        return self.inner(x) * random.random()


class Changes(Layer):
    def forward(self, x):
        x["x"] = self.inner(x["x"])
        return x["x"] * 1


class Pre(Layer):
    def __init__(self):
        super().__init__()
        self.inner.register_forward_pre_hook(lambda module, args: None)


class Scales(Layer):
    number = 0

    def __init__(self):
        super().__init__()
        self.layer_idx = Scales.number = Scales.number + 1

    def forward(self, x):
        return self.inner(x) / (self.layer_idx + 1)


class Object(Layer):
    def forward(self, x, other):
        return self.inner(x)


REASONS = {
    Keeps: "it keeps something of a call in Keeps.kept",
    Lists: "it keeps something of a call",
    Draws: "it draws random numbers that are not torch's",
    Changes: "it changes what it is given",
    Pre: "there is a hook on inner",
    Scales: "its own number goes into more than its cache",
    Object: "a object",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_layer_that_does_more_than_compute_is_traced_by_itself(kind):
    class Calls(Stack):
        def forward(self, x):
            for layer in self.layers:
                match kind.__name__:
                    case "Changes":
                        x = layer({"x": x})
                    case "Object":
                        x = layer(x, object())
                    case _:
                        x = layer(x)
            return x

    one = trace(Calls(kind).eval(), x=X)
    assert not one.stamped
    assert set(one.alone) == {"layers.0", *LATER}
    assert set(one.alone.values()) == {REASONS[kind]}


def test_what_goes_past_arguments_is_found_out():
    """A tensor that a layer keeps elsewhere, or takes from elsewhere: the model is traced in full, and says so."""

    class Leaks(Layer):
        kept: list = []  # noqa: RUF012

        def forward(self, x):
            given = self.inner(x)
            type(self).kept.append(given * 2)
            return given

    class Takes(Layer):
        kept: list = []  # noqa: RUF012

        def forward(self, x):
            return self.inner(x) + type(self).kept[0]

    class Calls(Stack):
        def forward(self, x):
            kind = type(self.layers[0])
            kind.kept[:] = [x * 3] if kind is Takes else []
            for layer in self.layers:
                x = layer(x)
            return x + sum(kind.kept)

    for kind, does in ((Leaks, "keeps something of a call"), (Takes, "reads something that it is not given")):
        model = Calls(kind).eval()
        one = trace(model, x=X)
        assert not one.stamped
        assert set(one.alone.values()) == {f"layers.0 {does}"}
        (given,) = run(one, model, X)
        assert_close(given, model(X))


class Replaces(Layer):
    def __init__(self):
        super().__init__()
        self.inner.register_forward_hook(lambda module, args, output: output * 2)


def test_a_hook_inside_that_changes_something_has_the_model_traced_in_full():
    model = Stack(Replaces).eval()
    one = trace(model, x=X)
    assert not one.stamped
    assert set(one.alone.values()) == {"a hook inside of a layer changes what a module gives"}
    (given,) = run(one, model, X)
    assert torch.equal(given, model(X))


def test_what_a_layer_in_a_layer_does_is_told_of_both():
    class Outer(Layer):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Keeps(), Keeps()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    one = trace(Stack(Outer).eval(), x=X)
    assert not one.stamped
    assert one.alone["layers.0"] == one.alone["layers.0.layers.0"] == "it keeps something of a call in Keeps.kept"


def test_a_model_that_cannot_be_traced_says_the_same():
    class Depends(Layer):
        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else x

    with pytest.raises(ModelError, match=r"E402.*GuardOnDataDependentSymNode"):
        trace(Stack(Depends).eval(), x=X)


def test_a_wrong_stamp_is_noticed():
    """A layer that has the first one's weight, and one that lacks a weight, are named."""
    model = Stack().eval()
    traced = trace(model, x=X)
    first = Body("layers.0", 0)
    calls = [(first, "layers.0"), *((first, each) for each in LATER)]
    aliases = tied_names(model)
    check_stamps(traced.graph, calls, aliases)
    own, other = (
        next(node for node in traced.graph.find_nodes(op="get_attr") if node.target == f"layers.{at}.inner.weight")
        for at in (2, 0)
    )
    own.replace_all_uses_with(other)
    with pytest.raises(VerifyError, match=r"layers.2 was made of layers.0, but layers\.[02] reads .*inner.weight"):
        check_stamps(traced.graph, calls, aliases)
