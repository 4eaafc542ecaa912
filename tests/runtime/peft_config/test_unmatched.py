"""A name in a PEFT config that chooses nothing is told, and a weight that is named twice is refused."""

import functools
import warnings

import peft
import pytest
import torch
from torch import nn

from peftc import compiler
from peftc.compiler import CheckpointError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.head, self.lone = nn.Linear(4, 4), nn.Linear(4, 2), nn.Parameter(torch.ones(2, 2))

    def forward(self, x):
        return self.head(self.linear(x)) @ self.lone


UNMATCHED = {
    "a module": ({"target_modules": ["linear", "linaer"]}, "'target_modules': no module is called 'linaer' .*'linear'"),
    "no module, but a parameter": (
        {"target_modules": ["other"], "target_parameters": ["lone"]},
        "'target_modules': no module is called 'other'",
    ),
    "a parameter": ({"target_parameters": ["other"]}, "'target_parameters': no parameter is called 'other'"),
    "a trained module": ({"modules_to_save": ["haed"]}, "'modules_to_save': no module is called 'haed' .*'head'"),
    "an excluded module": ({"exclude_modules": ["other"]}, "'exclude_modules': no module is called 'other'"),
    "a module's rank": (
        {"rank_pattern": {"linear": 3, "typo": 2}},
        "'rank_pattern': no adapted module is called 'typo'",
    ),
    "the rank of what is not adapted": (
        {"rank_pattern": {"head": 2}},
        "'rank_pattern': no adapted module is called 'head'",
    ),
    "a module's alpha": ({"alpha_pattern": {".*typo": 2}}, r"'alpha_pattern': no adapted module is called '\.\*typo'"),
}


def config(**fields):
    return peft.LoraConfig(**{"r": 2, "target_modules": ["linear"], **fields})


@pytest.mark.parametrize("name", UNMATCHED)
@pytest.mark.parametrize("added", [False, True])
def test_it_is_told_once(name, added):
    fields, told = UNMATCHED[name]
    model = compiler.apply(Net(), config())
    adapt = functools.partial(model.add_adapter, "other") if added else functools.partial(compiler.apply, Net())
    with pytest.warns(UserWarning, match=f"the PEFT config: field {told}") as caught:
        adapt(config(**fields))
    assert len([each for each in caught if "the PEFT config: field" in str(each.message)]) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ".*linear"},
        {"rank_pattern": {"linear": 3}, "alpha_pattern": {"^linear": 3}, "exclude_modules": ["head"]},
        {"target_modules": ["linear"], "target_parameters": ["lone"], "modules_to_save": ["ead"]},
        {"task_type": "SEQ_CLS"},
        {"modules_to_save": ["classifier", "score"]},
    ],
    ids=str,
)
def test_nothing_is_told_of_what_is_there(fields):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiler.apply(Net(), config(**fields))


def test_a_weight_is_not_named_twice():
    twice = config(target_parameters=["linear.weight"])
    with pytest.raises(ValueError, match="not also targeted with target_modules"):
        peft.get_peft_model(Net(), twice)
    with pytest.raises(CheckpointError, match=r"E325.*'linear.weight' is named by 'target_parameters'"):
        compiler.apply(Net(), twice)
