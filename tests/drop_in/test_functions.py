"""PEFT's functions over adapted models, compared with PEFT's."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peftc import peft as ours
from peftc.compiler import CheckpointError

X = torch.linspace(-1, 1, 8).view(2, 4)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def config(**fields):
    return peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **fields)


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["2"]}, {"bias": "all"}])
def test_the_bases_tensors_are_taken_out_and_put_in(fields):
    base = net().eval()
    before = copy.deepcopy(base.state_dict())
    model = ours.get_peft_model(base, config(**fields)).eval()
    theirs = peft.get_peft_model(net(), config(**fields)).eval()
    found = ours.get_base_model_state_dict(model)
    wanted = peft.get_base_model_state_dict(theirs)
    assert found.keys() == wanted.keys() == before.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    other = {key: each + 1 for key, each in before.items()}
    told = ours.set_base_model_state_dict(model, other)
    peft.set_base_model_state_dict(theirs, other)
    assert (told.missing_keys, told.unexpected_keys) == ([], [])
    assert all(torch.equal(each, other[key]) for key, each in ours.get_base_model_state_dict(model).items())
    assert all(torch.equal(each, before[key]) for key, each in base.state_dict().items()), (
        "the user's model is as it was"
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model(X), base(X))
    given = ours.get_peft_model_state_dict(model)
    ours.set_peft_model_state_dict(model, given)
    peft.set_peft_model_state_dict(theirs, given)
    torch.testing.assert_close(model(X), theirs(X))


def test_other_keys_than_the_bases():
    model = ours.get_peft_model(net(), config()).eval()
    before = {key: each.clone() for key, each in ours.get_base_model_state_dict(model).items()}
    wrong = {"0.weight": torch.ones(4, 4), "no.such": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"unexpected key 'no\.such'"):
        ours.set_base_model_state_dict(model, wrong)
    assert all(torch.equal(each, before[key]) for key, each in ours.get_base_model_state_dict(model).items())
    told = ours.set_base_model_state_dict(model, wrong, strict=False)
    assert told.unexpected_keys == ["no.such"]
    assert set(told.missing_keys) == before.keys() - {"0.weight"}
    assert torch.equal(ours.get_base_model_state_dict(model)["0.weight"], torch.ones(4, 4))


def test_of_a_model_that_others_have_wrapped():
    model = ours.get_peft_model(net(), config())
    wanted = ours.get_peft_model_state_dict(model)
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        found = ours.get_peft_model_state_dict(wrapped)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        told = ours.set_peft_model_state_dict(wrapped, {key: each * 0 for key, each in wanted.items()})
        assert told.missing_keys == []
    assert all(not each.any() for each in ours.get_peft_model_state_dict(model).values())
    with pytest.raises(TypeError, match="DataParallel is not a model that peftc has adapted"):
        ours.get_peft_model_state_dict(nn.DataParallel(net()))


def test_what_is_merged_is_not_swapped(tmp_path):
    model = ours.get_peft_model(net(), config()).eval()
    model.save_pretrained(tmp_path)
    model.add_adapter("other", config())
    model.merge_adapter(["default"])
    before = model(X)
    with pytest.raises(ValueError, match="adapter 'default' is merged"):
        ours.hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(model(X), before)
    ours.hotswap_adapter(model, tmp_path, "other")
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("training", [False, True])
def test_swapping_changes_values_and_nothing_else(training, tmp_path):
    model = ours.get_peft_model(net(), config()).train(training)
    model.add_adapter("other", config(), autocast_adapter_dtype=False)
    ours.get_peft_model(net(), config()).save_pretrained(tmp_path)
    for name in ("default", "other"):
        ours.hotswap_adapter(model, tmp_path, name)
    assert all(each.training is training for name, each in model.named_modules() if "adapter_bank" not in name)
    assert model.active_adapters == ["default"]
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    assert trained
    assert all("default" in name for name in trained)
    with pytest.raises(TypeError, match="E589"):
        ours.hotswap_adapter(model, tmp_path, "other", is_trainable=True)
    assert set(model.peft_config) == {"default", "other"}
    model.delete_adapter("default")
    assert [name for name, each in model.named_parameters() if each.requires_grad], "it only rested"


def test_a_file_that_is_swapped_in_is_read_once(tmp_path):
    model = ours.get_peft_model(net(), config())
    ours.get_peft_model(net(), config(lora_alpha=3)).save_pretrained(tmp_path)
    place = tmp_path / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "of_a_newer_peft": 1}))
    with pytest.warns(UserWarning, match="of_a_newer_peft") as told:
        ours.hotswap_adapter(model, tmp_path, "default")
    assert len(told) == 1
    wanted = load_file(tmp_path / "adapter_model.safetensors")
    found = ours.get_peft_model_state_dict(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_what_is_left_of_a_budget_is_swapped_in_with_it(tmp_path):
    asked = ours.AdaLoraConfig(target_modules=["0"], init_r=4, target_r=1, total_step=3, init_lora_weights=False)
    trained = ours.get_peft_model(net(), asked)
    for step in range(3):
        trained(X).sum().backward()
        trained.update_and_allocate(step + 1)
        trained.zero_grad()
    trained.save_pretrained(tmp_path)
    model = ours.get_peft_model(net(), asked)
    ours.hotswap_adapter(model, tmp_path, "default")
    kept, wanted = (each.adapter_bank.default.allocator.masks for each in (model, trained))
    assert {key: mask.tolist() for key, mask in kept.items()} == {key: mask.tolist() for key, mask in wanted.items()}
    assert sum(mask.sum() for mask in kept.values()) == 1


def test_a_base_is_not_set_half_or_below_what_is_merged():
    model = ours.get_peft_model(net(), config()).eval()
    before = {key: each.clone() for key, each in ours.get_base_model_state_dict(model).items()}
    wrong = {key: each + 1 for key, each in before.items()} | {"2.weight": torch.ones(3, 3)}
    with pytest.raises(CheckpointError, match=r"E342.*'2\.weight' has shape \[3, 3\], expected \[2, 4\]"):
        ours.set_base_model_state_dict(model, wrong)
    assert all(torch.equal(each, before[key]) for key, each in ours.get_base_model_state_dict(model).items())
    model.merge_adapter()
    merged = model(X)
    with pytest.raises(ValueError, match="E593"):
        ours.set_base_model_state_dict(model, before)
    assert torch.equal(model(X), merged)
    assert all(torch.equal(each, before[key]) for key, each in ours.get_base_model_state_dict(model).items())


def test_a_given_state_is_read_whatever_modules_and_adapters_are_called():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(4, 4)

        def forward(self, x):
            return self.module(x)

    fields = peft.LoraConfig(r=2, target_modules=["module"], init_lora_weights=False)
    model = ours.get_peft_model(Odd(), fields, adapter_name="module")
    zeros = {key: each * 0 for key, each in model.state_dict().items()}
    assert not any(each.any() for each in ours.get_peft_model_state_dict(model, zeros, "module").values())
    wrapped = nn.DataParallel(model)
    zeros = {key: each * 0 for key, each in wrapped.state_dict().items()}
    assert not any(each.any() for each in ours.get_peft_model_state_dict(wrapped, zeros, "module").values())
    assert all(each.any() for each in ours.get_peft_model_state_dict(wrapped, adapter_name="module").values())
