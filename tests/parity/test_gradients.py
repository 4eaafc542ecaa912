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


def different_gradients(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> list[str]:
    """The keys of parameters whose gradient is not the same, or that only one of the two trains."""
    scale = max(float(each.abs().max()) for each in theirs.values())
    return [
        key
        for key in sorted({*ours, *theirs})
        if key not in ours
        or key not in theirs
        or ours[key].numel() != theirs[key].numel()
        or not torch.allclose(ours[key].reshape(theirs[key].shape), theirs[key], rtol=1e-4, atol=1e-6 * scale)
    ]


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
    assert bool(different_gradients(mine, its)) != case.gradients, different_gradients(mine, its)
    assert max(float(each.abs().max()) for each in mine.values()) > 0


def test_a_gradient_of_another_parameter_is_noticed() -> None:
    torch.manual_seed(0)
    theirs = {"a": torch.randn(2, 3), "b": torch.randn(2, 3)}
    assert different_gradients(theirs, theirs) == []
    assert different_gradients({"a": theirs["b"], "b": theirs["a"]}, theirs) == ["a", "b"]
    assert different_gradients({"a": theirs["a"]}, theirs) == ["b"]
    assert different_gradients({**theirs, "b": theirs["b"] * 1.001}, theirs) == ["b"]
