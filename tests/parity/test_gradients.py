"""The gradient of every trained parameter of every built-in method is peft's."""

from collections.abc import Mapping
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from peftc import compiler
from peftc.runtime.peft_format.checkpoint import checkpoint_keys
from tests.parity.cases.case import Case
from tests.parity.method_cases import Base, batch, make_base, theirs, where_peft_has_it


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest) -> Base:
    return make_base(request.param)


def their_gradients(wrapped: nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of each of peft's trained parameters, by the key of its file; by its own name where it has none."""
    keys = {each.data_ptr(): key for key, each in peft.get_peft_model_state_dict(wrapped).items()}
    trained = {name: each for name, each in wrapped.named_parameters() if each.grad is not None}
    return {keys.get(each.data_ptr(), name): each.grad for name, each in trained.items()}


def our_gradients(adapted: compiler.AdaptedModel, adapter: str) -> dict[str, torch.Tensor]:
    """The gradient of each of an adapter's trained parameters, by the key of peft's file."""
    parameters = adapted._adapter_state.adapter(adapter)
    tensors = {key: parameters.tensor(owner) for key, owner in checkpoint_keys(parameters.plan).items()}
    return {key: each.grad for key, each in tensors.items() if each.grad is not None}


NEAR = 3e-4  # of the largest number in a gradient; and of the largest in all of them, what is rounding alone
ROUNDING = 1e-6


def different_gradients(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """How far apart the gradients of a parameter are, where they are not the same or only one of the two trains it."""
    largest = max(float(each.abs().max()) for each in theirs.values())
    apart: dict[str, float] = {key: float("inf") for key in {*ours} ^ {*theirs}}
    for key in {*ours} & {*theirs}:
        mine, its = ours[key].flatten(), theirs[key].flatten()
        distance = float((mine - its).abs().max()) if mine.shape == its.shape else float("inf")
        if distance > NEAR * float(its.abs().max()) + ROUNDING * largest:
            apart[key] = distance / float(its.abs().max())
    return apart


@pytest.mark.filterwarnings("ignore")
@where_peft_has_it
def test_gradients_are_pefts(case: Case, base: Base, tmp_path: Path) -> None:
    name, model, adapted = base
    inputs = batch()
    wrapped = theirs(case, name, model)
    wrapped.save_pretrained(tmp_path)
    adapted.load_adapter(tmp_path, "loaded", is_trainable=True)
    try:
        for each in (wrapped, adapted):
            each(**inputs).logits.square().sum().backward()
        mine, its = our_gradients(adapted, "loaded"), their_gradients(wrapped)
    finally:
        adapted.delete_adapter("loaded")
    apart = different_gradients(mine, its)
    assert bool(apart) != case.gradients, apart
    assert max(float(each.abs().max()) for each in mine.values()) > 0


def test_a_gradient_of_another_parameter_is_noticed() -> None:
    torch.manual_seed(0)
    theirs = {"a": torch.randn(2, 3), "b": torch.randn(2, 3)}
    assert different_gradients(theirs, theirs) == {}
    assert set(different_gradients({"a": theirs["b"], "b": theirs["a"]}, theirs)) == {"a", "b"}
    assert set(different_gradients({"a": theirs["a"]}, theirs)) == {"b"}
    assert set(different_gradients({**theirs, "b": theirs["b"] * 1.001}, theirs)) == {"b"}
    assert set(different_gradients({**theirs, "b": theirs["b"].flip(0)}, theirs)) == {"b"}
