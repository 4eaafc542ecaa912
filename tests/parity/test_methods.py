"""Every built-in method against peft: outputs both ways, gradients, merging, and the start is the base exactly."""

import copy
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.compiler.api import adapt
from peftc.grammar.spec.library import builtin_methods
from peftc.runtime.peft_format.checkpoint import checkpoint_keys
from tests.parity.cases import low_rank, other, rotations
from tests.parity.cases.case import MODELS, Case

CASES = (*low_rank.CASES, *rotations.CASES, *other.CASES)

Base = tuple[str, nn.Module, compiler.AdaptedModel]


def pairs(chosen: Callable[[Case, str], bool]) -> pytest.MarkDecorator:
    """Parametrise `base` and `case` with the models and cases for which something can be shown."""
    found = []
    for name, case in itertools.product(MODELS, CASES):
        if chosen(case, name):
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


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest) -> Base:
    """A model, and an adapted model of it that every case puts its adapter into: one trace serves them all."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)  # no bias is zero, no norm is one
    return request.param, model, adapt(model)


def close(found: torch.Tensor, wanted: torch.Tensor, case: Case) -> None:
    assert_close(found, wanted, rtol=0, atol=case.tolerance * float(wanted.abs().max()))


def test_every_method_is_here() -> None:
    """But those that change no weight: test_prefix, test_prompt, test_cpt, test_adaption_prompt and test_tokens.

    And one that needs a quantized base: test_loftq.
    """
    changing = {name for name, rule in builtin_methods().items() if rule.prompt is None and not rule.rows}
    assert {each.method for each in (*CASES, *low_rank.UNSAVED)} == changing - {"loftq"}


@pytest.mark.filterwarnings("ignore")
@where_peft_has_it
def test_both_ways(case: Case, base: Base, tmp_path: Path) -> None:
    name, model, adapted = base
    inputs = batch()
    with torch.no_grad():
        plain = model(**inputs).logits
        wrapped = theirs(case, name, model)
        wrapped.save_pretrained(tmp_path / "theirs")
        expected = wrapped(**inputs).logits
        assert (expected - plain).abs().max() > 1e-3
        adapted.load_adapter(tmp_path / "theirs", "loaded")
        try:
            close(adapted(**inputs).logits, expected, case)
            adapted.add_adapter(case.spec(name), "made", calibration=[inputs])
            if case.starts_as_base:
                assert_close(adapted(**inputs).logits, plain, rtol=0, atol=case.start_tolerance)
            moved(adapted, "adapter_bank.made", case.std)
            unmerged = adapted(**inputs).logits
            assert (unmerged - plain).abs().max() > 1e-3
            adapted.save_pretrained(tmp_path, selected_adapters=["made"])
            back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "made").eval()
            close(back(**inputs).logits, unmerged, case)

            adapted.merge_adapter()
            close(adapted(**inputs).logits, unmerged, case)
            adapted.unmerge_adapter()
            assert torch.equal(adapted(**inputs).logits, unmerged)
        finally:
            adapted.delete_adapter(adapted._adapter_state.names())


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


@pytest.mark.filterwarnings("ignore")
@where_it_has_not
def test_where_peft_has_none(case: Case, base: Base) -> None:
    name, model, _ = base
    with pytest.raises((NotImplementedError, TypeError, ValueError)):
        theirs(case, name, model)
