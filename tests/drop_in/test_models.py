"""What PEFT's class of models has beside what every adapted model has, compared with PEFT's."""

import copy
import pickle

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from peftc import peft as ours
from peftc.compiler import CheckpointError

SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
X = torch.linspace(-1, 1, 30).view(3, 10)


class Net(nn.Module):
    """Has dropout, and is in training mode as it is made."""

    def __init__(self, words: int = 12):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(words, 10)
        self.lin0, self.drop, self.lin1 = nn.Linear(10, 20), nn.Dropout(0.5), nn.Linear(20, 2)

    def forward(self, x):
        return self.lin1(self.drop(torch.relu(self.lin0(x + self.emb(torch.tensor([1, 2, 3]))))))


def config(**fields):
    return peft.LoraConfig(**{"r": 2, "target_modules": ["lin0"], "init_lora_weights": False, **fields})


@pytest.fixture
def saved(tmp_path):
    model = peft.get_peft_model(Net(), config(target_modules=["lin0", "emb"]))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    return tmp_path


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copied(copied):
    model = ours.get_peft_model(Net(), config()).eval()
    again = copied(model)
    assert type(again) is type(model)
    assert torch.equal(again(X), model(X))
    with torch.no_grad():
        next(again.adapter_bank.parameters()).add_(1)
    assert not torch.equal(again(X), model(X))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_loaded_model_is_in_evaluation_unless_it_is_to_be_trained(saved, is_trainable):
    base = Net()
    model = ours.PeftModel.from_pretrained(base, saved, is_trainable=is_trainable)
    theirs = peft.PeftModel.from_pretrained(Net(), saved, is_trainable=is_trainable)
    assert {name: each.training for name, each in base.named_modules()} == dict.fromkeys(
        dict(base.named_modules()), True
    )
    assert model.training is model.drop.training is theirs.training is is_trainable
    torch.testing.assert_close(model.eval()(X), theirs.eval()(X))
    model.train().load_adapter(saved, "other", is_trainable=is_trainable)
    theirs.train().load_adapter(saved, "other", is_trainable=is_trainable)
    assert model.training is theirs.training is is_trainable


def test_where_tensors_are_to_be_is_the_bases_say(saved):
    model = ours.PeftModel.from_pretrained(Net(), saved, torch_device="cpu", device_map={"": "cpu"}, max_memory=None)
    model.load_adapter(saved, "other", torch_device="cpu", device_map="auto")
    assert model.active_adapters == ["default"]
    with pytest.raises(ValueError, match="ephemeral_gpu_offload is not supported"):
        model.load_adapter(saved, "third", ephemeral_gpu_offload=True)


@pytest.mark.parametrize("said", [lambda config: config, lambda config: config.to_dict()])
def test_another_config_than_the_files(saved, said):
    asked = config(target_modules=["lin0", "emb"], lora_alpha=31)
    before = copy.deepcopy(asked)
    model = ours.PeftModel.from_pretrained(Net(), saved, config=said(asked))
    theirs = peft.PeftModel.from_pretrained(Net(), saved, config=copy.deepcopy(asked))
    assert model.peft_config["default"].lora_alpha == 31
    torch.testing.assert_close(model(X), theirs(X))
    assert asked == before
    with pytest.raises(TypeError):
        ours.PeftModel.from_pretrained(Net(), saved, config=3)


def test_other_sizes_are_left_out_if_that_is_asked(saved):
    with pytest.raises(CheckpointError, match=r"lora_embedding_A' has shape \[2, 12\], expected \[2, 15\]"):
        ours.PeftModel.from_pretrained(Net(15), saved)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="left unread: .*lora_embedding_A"):
        model = ours.PeftModel.from_pretrained(Net(15), saved, ignore_mismatched_sizes=True)
    theirs = peft.PeftModel.from_pretrained(Net(15), saved, ignore_mismatched_sizes=True)
    mine, other = ours.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(theirs)
    kept = [key for key in mine if "lora_embedding_A" not in key]
    assert len(kept) == 3
    for key in kept:
        torch.testing.assert_close(mine[key], other[key])
    assert mine["base_model.model.emb.lora_embedding_A"].shape == (2, 15)


def test_the_prefix_finds_the_adapters_parameters():
    model = ours.get_peft_model(Net(), config())
    theirs = peft.get_peft_model(Net(), config())
    mine = [tuple(each.shape) for name, each in model.named_parameters() if model.prefix in name]
    assert mine == [tuple(each.shape) for name, each in theirs.named_parameters() if theirs.prefix in name]
    assert all(each.requires_grad == (model.prefix in name) for name, each in model.named_parameters())


def test_whether_a_call_runs_adapters():
    model = ours.get_peft_model(Net(), config())
    assert model.has_active_enabled_adapter
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
    model.delete_adapter("default")
    assert not model.has_active_enabled_adapter


def test_configs_are_one_dictionary_that_follows():
    model = ours.get_peft_model(Net(), config())
    held = model.peft_config
    model.add_adapter("other", config(r=3))
    assert model.peft_config is held
    assert {name: each.r for name, each in held.items()} == {"default": 2, "other": 3}
    model.delete_adapter("other")
    assert list(held) == ["default"]


def test_a_base_of_ones_own_is_found_by_pefts_path():
    model = ours.get_peft_model(Net(), config())
    assert model.base_model.model.lin0 is model.lin0
    assert type(model.base_model.model) is Net


def test_what_the_base_has_is_found_behind_base_model():
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    model = ours.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    assert model.base_model.lm_head is model.lm_head
    assert model.base_model.model.model.layers is model.model.layers
    assert not hasattr(model.base_model, "no_such_module")
    with pytest.raises(AttributeError, match="no_such_module"):
        model.base_model.no_such_module  # noqa: B018


@pytest.mark.parametrize("name", ["default", "mine"])
def test_an_adapter_is_saved_where_peft_saves_it(name, tmp_path):
    ours.get_peft_model(Net(), config(), adapter_name=name).save_pretrained(tmp_path / "ours")
    peft.get_peft_model(Net(), config(), adapter_name=name).save_pretrained(tmp_path / "theirs")
    where = [
        sorted(str(each.parent.relative_to(tmp_path / side)) for each in (tmp_path / side).rglob("adapter_config.json"))
        for side in ("ours", "theirs")
    ]
    assert where[0] == where[1] == ["." if name == "default" else "mine"]


def test_what_peft_scripts_ask_before_training():
    model = ours.get_peft_model(Net(), config())
    assert model.prepare_model_for_gradient_checkpointing(model) is model


def test_rows_have_adapters_of_their_own(tmp_path):
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    theirs.add_adapter("other", peft.LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False))
    theirs.eval().save_pretrained(tmp_path)
    model = ours.PeftModel.from_pretrained(base, tmp_path).eval()
    model.load_adapter(tmp_path / "other", adapter_name="other")
    call = {"input_ids": torch.ones(3, 2, dtype=torch.long), "adapter_names": ["default", "other", "__base__"]}
    torch.testing.assert_close(model(**call).logits, theirs(**call).logits, atol=1e-5, rtol=1e-5)
    more = {"max_new_tokens": 3, "min_new_tokens": 3}
    assert torch.equal(model.generate(**call, **more), theirs.generate(**call, **more))


def test_a_config_that_leaves_things_unsaid_leaves_them_to_the_file(saved):
    asked = peft.LoraConfig(r=2, lora_alpha=31)
    model = ours.PeftModel.from_pretrained(Net(), saved, config=asked)
    assert model.peft_config["default"].lora_alpha == 31
    assert set(model.peft_config["default"].target_modules) == {"lin0", "emb"}


class Delegating(hf.LlamaForCausalLM):
    @property
    def delegated(self):
        return self.base_model.delegated


def test_a_property_that_asks_the_base_does_not_go_round_in_circles():
    model = ours.get_peft_model(Delegating(hf.LlamaConfig(**SIZES)), peft.LoraConfig(target_modules=["q_proj"]))
    assert not hasattr(model, "delegated")
    assert not hasattr(model.base_model, "delegated")
    assert model.base_model.has_active_enabled_adapter
    assert not hasattr(copy.deepcopy(model.base_model), "model")


def test_a_part_in_training_mode_is_put_into_evaluation_too(saved):
    base = Net().eval()
    base.drop.train()
    assert not ours.PeftModel.from_pretrained(base, saved).drop.training
    assert base.drop.training


def test_what_is_for_inference_only_is_not_trained_once_it_is_alone():
    model = ours.get_peft_model(Net(), config())
    model.add_adapter("other", config(inference_mode=True))
    model.add_adapter("third", config())
    model.set_requires_grad(["third"], True)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert {name.split(".")[1] for name, each in model.named_parameters() if each.requires_grad} == {"third"}


def test_the_card_of_an_adapter_in_a_directory_says_so(tmp_path):
    ours.get_peft_model(Net(), config(), adapter_name="mine").save_pretrained(tmp_path)
    card = next(tmp_path.rglob("README.md")).read_text()
    assert 'subfolder="mine"' in card
    ours.PeftModel.from_pretrained(Net(), tmp_path, subfolder="mine")


def test_load_adapter_by_either_name(saved):
    model = ours.get_peft_model(Net(), config())
    model.load_adapter(peft_model_id=saved, adapter_name="one")
    model.load_adapter(model_id=saved, adapter_name="two")
    assert list(model.peft_config) == ["default", "one", "two"]
    for wrong in ({}, {"model_id": saved, "peft_model_id": saved}):
        with pytest.raises(TypeError, match="E589"):
            model.load_adapter(adapter_name="three", **wrong)


def test_what_does_not_fit_is_said_to_be_missing(saved):
    model = ours.get_peft_model(Net(15), config())
    with pytest.warns(UserWarning, match="left unread"):
        told = model.load_adapter(saved, "other", ignore_mismatched_sizes=True)
    assert told.missing_keys == ["base_model.model.emb.lora_embedding_A"]


def test_an_adapters_name_leads_nowhere_else(tmp_path):
    outside = tmp_path / "outside"
    model = ours.get_peft_model(Net(), config(), adapter_name=str(outside).replace(".", "_"))
    with pytest.raises(CheckpointError, match="E310"):
        model.save_pretrained(tmp_path / "inside")
    assert not outside.exists()
