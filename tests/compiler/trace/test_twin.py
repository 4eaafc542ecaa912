import threading

import pytest
import torch
import transformers as hf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from peftc.compiler.trace.twin import Twin
from peftc.grammar.diagnostics import ModelError


@pytest.fixture
def model():
    config = hf.GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    return hf.GPT2LMHeadModel(config)


def test_a_twin_has_no_data_and_the_models_places(model):
    twin = Twin(model)
    assert type(twin.model) is type(model)
    for (name, one), (other, two) in zip(model.named_parameters(), twin.model.named_parameters(), strict=True):
        assert name == other
        assert isinstance(two, FakeTensor)
        assert (one.shape, one.dtype, one.device) == (two.shape, two.dtype, two.device)
    assert all(isinstance(each, FakeTensor) for each in twin.model.buffers())
    assert isinstance(twin.fake(torch.zeros(2)), FakeTensor)


def test_ties_are_kept(model):
    twin = Twin(model).model
    assert twin.lm_head.weight is twin.transformer.wte.weight


def test_the_config_is_shared(model):
    assert Twin(model).model.config is model.config


def test_the_source_is_untouched(model):
    before = {name: (id(each), each.clone(), each.requires_grad) for name, each in model.named_parameters()}
    names = set(vars(model))
    twin = Twin(model).model
    twin.transformer.h[0].mlp.c_fc = nn.Identity()
    twin.anything = 1
    twin.train(not model.training)
    assert set(vars(model)) == names
    assert type(model.transformer.h[0].mlp.c_fc) is not nn.Identity
    for name, each in model.named_parameters():
        assert before[name][0] == id(each)
        assert torch.equal(before[name][1], each)
        assert before[name][2] == each.requires_grad


def test_every_twin_has_a_mode_of_its_own(model):
    assert Twin(model).mode is not Twin(model).mode


def test_what_cannot_be_copied():
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(ModelError, match=r"E401.*Linear cannot be copied"):
        Twin(model)
