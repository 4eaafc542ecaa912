"""A checkpoint that does not fit, or fails half-way: the model is what it was."""

import sys

import pytest
import torch
from torch import nn

from peftc import compiler
from peftc.grammar.diagnostics import CheckpointError
from peftc.runtime.model import adding
from peftc.runtime.model.loading import load_adapter
from peftc.runtime.peft_format import checkpoint
from peftc.runtime.peft_format.load_options import LoadOptions

SPEC = 'adapter a = lora(rank = 2) { on "0" }'
X = torch.linspace(-1, 1, 8).reshape(2, 4)


def adapted(spec=SPEC, width=5):
    torch.manual_seed(0)
    made = compiler.apply(nn.Sequential(nn.Linear(4, width), nn.Tanh()).eval(), spec).eval()
    for parameter in made.adapter_bank.parameters():
        nn.init.normal_(parameter)
    return made


def everything(model):
    state = model._adapter_state
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    return state.names(), state.active, state.base.facts.task_type, trained, model(X).tolist()


@pytest.mark.parametrize("trainable", [True, False])
def test_it_is_the_one_that_was_saved(trainable, tmp_path):
    saved = adapted()
    saved.save_pretrained(tmp_path)
    model = compiler.load(nn.Sequential(*(saved.unload().children())).eval(), tmp_path, is_trainable=trainable)
    assert torch.equal(model(X), saved(X))
    assert model._adapter_state.adapter("default").is_trainable is trainable


def test_beside_an_active_one_it_rests(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = adapted()
    before = model(X)
    load_adapter(model, tmp_path, "b", LoadOptions(is_trainable=True))
    assert model.active_adapters() == ["a"]
    assert torch.equal(model(X), before)


def test_what_a_file_has_to_hold_is_worked_out_once(tmp_path, monkeypatch):
    adapted().save_pretrained(tmp_path)
    model, asked, entries = adapted(), [], checkpoint.entries

    def counted(plan):
        asked.append(plan)
        return entries(plan)

    for module in list(sys.modules.values()):
        if getattr(module, "entries", None) is entries:
            monkeypatch.setattr(module, "entries", counted)
    load_adapter(model, tmp_path, "b", LoadOptions())
    assert len(asked) == 1


def test_one_that_does_not_fit(tmp_path):
    adapted(width=6).save_pretrained(tmp_path)
    model = adapted()
    before = everything(model)
    with pytest.raises(CheckpointError):
        load_adapter(model, tmp_path, "b", LoadOptions())
    assert everything(model) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_one_that_fails_half_way(error, tmp_path, monkeypatch):
    adapted().save_pretrained(tmp_path)
    model = adapted()
    model.set_adapter([])
    before = everything(model)

    def fails(*_, **__):
        raise error("ours")

    with monkeypatch.context() as patched:
        patched.setattr(adding, "initial", fails)
        with pytest.raises(error, match="ours"):
            load_adapter(model, tmp_path, "b", LoadOptions())
    assert everything(model) == before
    load_adapter(model, tmp_path, "b", LoadOptions())
    assert model.active_adapters() == ["b"]
