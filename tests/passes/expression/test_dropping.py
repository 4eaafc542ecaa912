"""Dropout that a kind of place has no input for is refused when it is asked for, and no other is."""

import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftc import compiler
from peftc.compiler import AdapterError
from peftc.grammar.diagnostics import SpecError
from peftc.grammar.spec.library import builtin_methods
from peftc.runtime.model import adding
from tests.matrix import wide

PLACES = {
    "linear": (lambda: nn.Linear(8, 8), torch.ones(2, 8)),
    "conv1d": (lambda: Conv1D(8, 8), torch.ones(2, 8)),
    "embedding": (lambda: nn.Embedding(8, 8), torch.tensor([[1, 2]])),
    "convolution1d": (lambda: nn.Conv1d(8, 8, 2), torch.ones(1, 8, 5)),
    "conv2d": (lambda: nn.Conv2d(8, 8, 2), torch.ones(1, 8, 5, 5)),
    "conv2d in groups": (lambda: nn.Conv2d(8, 8, 2, groups=2), torch.ones(1, 8, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(8, 8, 2), torch.ones(1, 8, 4, 4, 4)),
}
ARGUMENTS = {  # to fit a weight of eight by eight, and a kernel's too
    "adalora": "rank = 4, target = 2, steps = 9",
    "miss_bat": "rank = 4",
    "miss_mini": "rank = 2, mini = 2",
    "supertuning_lora": "rank = 2, sparsity = 0.5",
    **dict.fromkeys(("hira", "lora", "dora", "vera", "miss", "psoft"), "rank = 2"),
    **dict.fromkeys(("vblora", "vblora_topk"), "rank = 2, length = 4"),
}
CALIBRATED = {"corda", "eva", "loftq"}  # they start from more than a model, and are low-rank as others are
DROPPING = [
    (name, place)
    for name, rule in builtin_methods().items()
    for place in PLACES
    if any(each.name == "dropout" for each in rule.hyperparameters) and place.split()[0] in rule.kinds
    if name not in CALIBRATED
]


class Net(nn.Module):
    def __init__(self, place):
        super().__init__()
        self.it = PLACES[place][0]()

    def forward(self, x):
        return self.it(x)


def spec(name, dropout=0.5):
    return f"adapter a = {name}({', '.join(filter(None, (ARGUMENTS.get(name), f'dropout = {dropout}')))}) {{ on it }}"


def refusal(run):
    """What is said against it; nothing where it is done."""
    try:
        run()
    except AdapterError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("name", "place"), wide(DROPPING, {"lora", "delora"}))
def test_what_is_refused_when_asked_for_is_what_no_call_could_do(name, place, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(adding, "_check_dropout", lambda plan: None)
        adapted = compiler.apply(Net(place), spec(name)).train()
    called = refusal(lambda: adapted(PLACES[place][1]))
    asked = refusal(lambda: compiler.apply(Net(place), spec(name)))
    assert ("E420" in called) is ("E212" in asked) is bool(asked) is bool(called)
    assert not asked or "dropout cannot be honoured at it, of kind" in asked
    assert not refusal(lambda: compiler.apply(Net(place), spec(name, 0)))


@pytest.mark.parametrize("place", ["embedding", "convolution1d", "conv2d", "conv2d in groups", "conv3d"])
def test_there_is_no_input_to_drop_from_that_lengths_have_met(place):
    adapted = compiler.apply(Net(place), spec("lora"))
    with pytest.raises(SpecError, match=r"(?s)E212.*set dropout = 0 there"):
        adapted.add_adapter(spec("delora"), "b")
    assert list(adapted.peft_config) == ["a"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiler.apply(Net(place), spec("delora", 0)).train()(PLACES[place][1])
