"""What the user's model has, read while the adapted one holds something else in place of it."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

from peftc import compiler
from peftc.runtime.adapted.base_weights import base_view

SPEC = "adapter a = ia3 { on all linear }\nadapter b = lora(rank = 2) { on all linear  train norm }\nactivate b"
X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5, bias=False)
        self.norm = nn.LayerNorm(5)
        self.second = nn.Linear(5, 3)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    model = Net().eval()
    adapted = compiler.apply(model, SPEC).eval()
    for parameter in adapted.adapter_bank.parameters():
        nn.init.normal_(parameter)
    return model, adapted


def objects(model):
    named = [*model.state_dict(keep_vars=True).items(), *model.named_modules()]
    return {name: id(each) for name, each in named}


READERS = {
    "own": lambda base: dict(base.own().tensors()),
    "fingerprint": lambda base: base.fingerprint(),
    "unmerged": lambda base: dict(base.unmerged().tensors()),
    "traceable": lambda base: dict(base.traceable().tensors()),
    "unloaded": lambda base: base.unloaded().state_dict(),
    "survey": lambda base: base.engine.backend.survey(),
}


@pytest.mark.parametrize("reader", READERS)
def test_reading_touches_no_module_of_a_merged_model(reader, pair):
    _, adapted = pair
    adapted.merge_adapter()
    before, merged = objects(adapted), adapted(X)
    counts = {name: each._version for name, each in adapted.named_parameters()}
    READERS[reader](adapted._adapter_state.base)
    assert objects(adapted) == before
    assert {name: each._version for name, each in adapted.named_parameters()} == counts
    assert torch.equal(adapted(X), merged)


@pytest.mark.parametrize("merged", [False, True])
def test_it_is_the_user_s_model(merged, pair):
    model, adapted = pair
    fingerprint = adapted.base_fingerprint()
    if merged:
        adapted.merge_adapter()
        assert not torch.equal(adapted.first.weight, model.first.weight)
    base = adapted._adapter_state.base
    for read in ("own", "unmerged", "unloaded"):
        found = READERS[read](base)
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items()), read
    assert base.fingerprint() == fingerprint
    assert torch.equal(base.unloaded()(X), model(X))
    assert type(base.own().module) is Net


def test_a_bias_that_a_merge_made_is_not_the_user_s():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False)).eval()
    adapted = compiler.apply(model, 'adapter a = lora(rank = 2, bias = true) { on "0" }').eval()
    for parameter in adapted.adapter_bank.parameters():
        nn.init.normal_(parameter)
    adapted.merge_adapter()
    assert adapted[0].bias is not None
    assert list(dict(adapted._adapter_state.base.own().tensors())) == ["0.weight"]
    assert adapted.unload()[0].bias is None


def test_swapping_undoes_itself_and_leaves_no_stale_graph(pair):
    _, adapted = pair
    base = adapted._adapter_state.base
    adapted.set_adapter([])
    before, held = adapted(X), objects(adapted)
    was = base.swap({"first.weight": torch.zeros(5, 4), "second.bias": None})
    assert torch.equal(adapted(X), nn.functional.linear(adapted.norm(torch.zeros(2, 5)), adapted.second.weight))
    base.swap(was)
    assert torch.equal(adapted(X), before)
    assert objects(adapted) == held


def test_a_deep_copy_has_its_own(pair):
    _, adapted = pair
    adapted.merge_adapter()
    copied = copy.deepcopy(adapted)
    copied.unmerge_adapter()
    assert adapted._adapter_state.base.merged == (("b", 1.0),)
    assert copied._adapter_state.base.merged == ()
    assert copied._adapter_state.base.model is copied
    assert not torch.equal(copied.first.weight, adapted.first.weight)


def test_a_view_has_no_adapters_and_the_very_modules(pair):
    model, adapted = pair
    view = base_view(adapted)
    assert type(view) is Net
    assert view.first is adapted.first
    assert [name for name, _ in view.named_children()] == [name for name, _ in model.named_children()]


def test_the_survey_is_made_again_when_a_weight_is_another_kind_of_tensor():
    config = hf.GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    adapted = compiler.apply(hf.GPT2LMHeadModel(config), "adapter a = lora(rank = 2) { on all conv1d }")
    backend = adapted._adapter_state.engine.backend
    first = backend.survey()
    assert backend.survey() is first
    adapted.resize_token_embeddings(20)
    assert backend.survey() is not first
