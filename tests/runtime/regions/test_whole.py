"""One graph of the whole model: what is changed inside of the model is seen at the next call, or refused there."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import ModelError
from tests import zoo
from tests.stack import Stack

X = torch.linspace(-1, 1, 8).reshape(2, 4)
IDS = torch.tensor([[3, 4, 5, 6]])


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop, self.scale = nn.Linear(4, 4), nn.Dropout(0.5), 1.0
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x):
        return self.drop(self.linear(x)) * self.scale + self.shift


def pair(spec="adapter a = lora(rank = 2) { on **.linear }"):
    torch.manual_seed(0)
    model = Stack([Layer(), Layer()]).eval()
    adapted = compiler.apply(model, spec, regions="model").eval()
    assert_close(adapted(X), model(X))
    return model, adapted


def agree(model, adapted):
    for mode in (False, True, False):
        kept = [each.training for each in model.modules()]
        if mode:
            model.train(), adapted.train()
        torch.manual_seed(1)
        wanted = model(X)
        torch.manual_seed(1)
        assert_close(adapted(X), wanted)
        if mode:
            for both in (model, adapted):
                for each, training in zip(
                    [each for name, each in both.named_modules() if not name.startswith("adapter_bank")],
                    kept,
                    strict=True,
                ):
                    each.training = training


SEEN = {
    "an attribute": lambda model: setattr(model.layers[0], "scale", 3.0),
    "an attribute of a part": lambda model: setattr(model.layers[0].drop, "p", 0.1),
    "a part that trains": lambda model: model.layers[0].drop.train(),
    "a replaced layer": lambda model: setattr(model.layers, "0", nn.Sequential(nn.Tanh(), nn.Identity())),
    "a replaced part": lambda model: setattr(model.layers[0], "drop", nn.Tanh()),
    "one layer more": lambda model: model.layers.append(nn.Tanh()),
    "layers that change places": lambda model: model.layers.insert(0, model.layers.pop(1)),
    "a method hidden": lambda model: setattr(model.layers[0], "extra_repr", lambda: ""),
}
REFUSED = {
    "a hook": lambda model: model.layers[0].register_forward_hook(lambda *_: None),
    "a hook before": lambda model: model.layers[0].linear.register_forward_pre_hook(lambda *_: None),
    "a forward": lambda model: setattr(model.layers[0], "forward", torch.tanh),
    "a parametrization": lambda model: parametrize.register_parametrization(
        model.layers[0].linear, "bias", nn.Identity()
    ),
    "adapted weights that train": lambda model: model.layers[0].linear.train(),
}


@pytest.mark.parametrize("change", SEEN.values(), ids=SEEN)
def test_what_is_changed_is_seen(change):
    model, adapted = pair()
    change(model), change(adapted)
    agree(model, adapted)


@pytest.mark.parametrize("change", SEEN.values(), ids=SEEN)
def test_a_copy_knows_what_was_changed_before_it_was_made(change):
    model, adapted = pair()
    change(model), change(adapted)
    agree(model, copy.deepcopy(adapted))


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_would_not_run_is_refused(change):
    _, adapted = pair()
    change(adapted)
    for _ in range(2):
        with pytest.raises(ModelError, match=r'E467.*layers\.0(.|\n)*regions = "model"'):
            adapted(X)


def test_what_is_refused_works_again_when_it_is_gone():
    model, adapted = pair()
    handle = adapted.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="E467"):
        adapted(X)
    handle.remove()
    agree(model, adapted)


def test_hooks_on_the_model_itself_run():
    _, adapted = pair()
    before = adapted(X)
    adapted.register_forward_hook(lambda _, given, output: output * 2)
    assert_close(adapted(X), before * 2)


def test_embeddings_may_be_made_to_ask_for_gradients():
    adapted = compiler.apply(zoo.make("llama"), "adapter a = prefix(length = 2)")
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable()
    for _ in range(2):
        adapted(IDS, labels=IDS).loss.backward()
    assert adapted._adapter_state.engine.trace_count == 1
    assert all(each.grad is not None for each in adapted.parameters() if each.requires_grad)


def test_hidden_states_that_were_asked_for_leave_no_hook_that_matters():
    """transformers leaves the hooks that gather them on the layers."""
    model = zoo.make("llama", num_hidden_layers=2)
    adapted = compiler.apply(zoo.make("llama", num_hidden_layers=2), "adapter a = prefix(length = 2)").eval()
    wanted = adapted(IDS).logits
    model(IDS, output_hidden_states=True)
    assert any(each._forward_hooks for each in model.modules()), "or there is nothing to show"
    again = compiler.apply(model, "adapter a = prefix(length = 2)").eval()
    again.load_state_dict(adapted.state_dict())
    assert_close(again(IDS).logits, wanted)
    model(IDS, output_hidden_states=True)
    hidden = again(IDS, output_hidden_states=True).hidden_states
    assert len(hidden) == len(adapted(IDS, output_hidden_states=True).hidden_states) == 3
    count = again._adapter_state.engine.trace_count
    again(IDS), again(IDS, output_hidden_states=True)
    assert again._adapter_state.engine.trace_count == count


def test_virtual_tokens_need_a_graph_that_has_no_hooks():
    adapted = compiler.apply(zoo.make("llama"), "adapter a = prefix(length = 2)").eval()
    adapted(IDS)
    adapted.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match=r"E467.*a hook on model\.layers\.0\.mlp"):
        adapted(IDS)


def test_a_config_that_is_changed():
    def made():
        return zoo.make("llama", num_hidden_layers=2)

    model = made()
    adapted = compiler.apply(made(), "adapter a = lora(rank = 2) { on all linear }", regions="model").eval()
    assert_close(adapted(IDS).logits, model(IDS).logits)
    for each in (model, adapted):
        each.config.output_hidden_states = True
    assert len(adapted(IDS).hidden_states) == len(model(IDS).hidden_states) == 3
    for both in (model, adapted):
        for each in both.model.layers:
            each.input_layernorm.variance_epsilon = 1.0
    assert_close(adapted(IDS).logits, model(IDS).logits)


def test_graphs_are_kept_where_nothing_changed():
    _, adapted = pair()
    engine = adapted._adapter_state.engine
    assert engine.trace_count == 1
    adapted.merge_adapter()
    adapted(X)
    adapted.unmerge_adapter()
    adapted.add_adapter("adapter b = ia3 { on **.linear }")
    adapted.set_adapter("b")
    adapted(X)
    adapted.load_state_dict(adapted.state_dict())
    adapted(X)
    assert engine.trace_count == 1
    adapted.train()
    adapted(X)
    adapted.eval()
    adapted(X)
    assert engine.trace_count == 2
