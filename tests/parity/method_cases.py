"""Every method as peft configures it and as a spec says it, on models that both adapt."""

import copy
import itertools
from collections.abc import Callable

import peft
import pytest
import torch
from torch import nn

from peftc import compiler
from peftc.compiler.api import adapt
from tests.parity.cases import low_rank, other, rotations
from tests.parity.cases.case import MODELS, Case

CASES = (*low_rank.CASES, *rotations.CASES, *other.CASES)

Base = tuple[str, nn.Module, compiler.AdaptedModel]


def pairs(chosen: Callable[[Case, str], bool]) -> pytest.MarkDecorator:
    """Parametrise `base` and `case` with the models and cases for which something can be shown.

    A method's settings change its formula, and are all tried on Llama; the other models bring other kinds of sites, and
    have the first of a method's cases that they support.
    """
    found = []
    seen = set()
    for name, case in itertools.product(MODELS, CASES):
        if chosen(case, name) and (name == "llama" or (name, case.method) not in seen):
            seen.add((name, case.method))
            marks = () if name == "llama" else pytest.mark.matrix
            found.append(pytest.param(name, case, marks=marks, id=f"{name}-{case.name}"))
    return pytest.mark.parametrize(("base", "case"), found, indirect=["base"])


where_peft_has_it = pairs(lambda case, name: name in case.models)
where_it_has_not = pairs(lambda case, name: name not in case.models and not case.targets)


def batch(rows: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(5, 64, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def moved(model: nn.Module, part: str, std: float) -> nn.Module:
    """Add noise to the trained tensors of a name: away from any start at which an adapter does nothing."""
    torch.manual_seed(2)
    found = [each for name, each in model.named_parameters() if part in name and each.requires_grad]
    assert found, part
    for each in found:
        each.add_(torch.randn_like(each) * std)
    return model


def theirs(case: Case, name: str, model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(copy.deepcopy(model), case.config(target_modules=case.targets_of(name))).eval()
    return moved(wrapped, case.prefix or wrapped.base_model.prefix, case.std)


def make_base(name: str) -> Base:
    """A model, and an adapted model of it that every case puts its adapter into: one trace serves them all."""
    model = MODELS[name]()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)  # no bias is zero, no norm is one
    return name, model, adapt(model)
