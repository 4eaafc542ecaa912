"""Adapters injected by the keys of tensors, as PEFT does it: of which modules they are, and what is told."""

import copy
import re
import warnings

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from peftc import peft as ours

SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
LORA = peft.LoraConfig(r=2, target_modules=["q_proj", "layers.1.mlp.up_proj"])


def base():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))


def keys_of(config, name="default"):
    made = peft.inject_adapter_in_model(copy.deepcopy(config), base(), name)
    return peft.get_peft_model_state_dict(made, adapter_name=name)


def injected(library, config, tensors):
    """The model, and the warnings of what differs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = library.inject_adapter_in_model(copy.deepcopy(config), base(), state_dict=tensors)
    return made, [str(each.message) for each in caught if issubclass(each.category, RuntimeWarning)]


def tensors_of(made):
    """What is adapted with which tensors, in PEFT's words, without the prefix that PEFT's injected models lack."""
    library = ours if hasattr(made, "adapter_bank") else peft
    found = library.get_peft_model_state_dict(made)
    return {key.removeprefix("base_model.model."): value for key, value in found.items()}


CONFIGS = {
    "the same": LORA,
    "others": peft.LoraConfig(r=2, target_modules=["v_proj", "q_proj"]),
    "none of them": peft.LoraConfig(r=2, target_modules=["o_proj"]),
    "what is not there": peft.LoraConfig(r=2, target_modules=["nothing"]),
    "all": peft.LoraConfig(r=2, target_modules="all-linear"),
    "a pattern": peft.LoraConfig(r=2, target_modules=r".*\.q_proj"),
    "left out": peft.LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], exclude_modules=["layers.0.self_attn.q_proj"]
    ),
    "one layer": peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    "ranks": peft.LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"layers.1.mlp.up_proj": 3}),
    "a trained module": peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_modules_are_those_of_the_tensors(name):
    state = keys_of(LORA)
    theirs, said = injected(peft, CONFIGS[name], state)
    made, told = injected(ours, CONFIGS[name], state)
    found, wanted = tensors_of(made), tensors_of(theirs)
    assert {key: each.shape for key, each in found.items()} == {key: each.shape for key, each in wanted.items()}
    assert all(not each.any() for key, each in found.items() if "lora_B" in key), "its values are not read"
    differs = [each for each in told if "that the state_dict has tensors of" in each]
    assert len(differs) == len([each for each in said if "inconsistency" in each])
    names = set(re.findall(r"model\.layers[\w.]+\w", " ".join(each for each in said if "inconsistency" in each)))
    assert set(re.findall(r"model\.layers[\w.]+\w", " ".join(differs))) == names


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(r=2, target_modules=["k_proj"]),
        peft.OFTConfig(oft_block_size=4, target_modules=["k_proj"]),
        peft.DeloraConfig(r=2, target_modules=["k_proj"]),
        peft.LNTuningConfig(target_modules=["input_layernorm"]),
        peft.LoraConfig(r=2, target_modules=["k_proj"], use_dora=True),
    ],
    ids=lambda each: each.peft_type.value + "_dora" * getattr(each, "use_dora", False),
)
def test_of_other_methods(config):
    state = keys_of(config)
    named = copy.copy(config)
    named.target_modules = {*config.target_modules, "v_proj"} - {"input_layernorm"}
    made, told = injected(ours, named, {key: each for key, each in state.items() if "layers.1" in key})
    theirs, _ = injected(peft, named, {key: each for key, each in state.items() if "layers.1" in key})
    assert tensors_of(made).keys() == tensors_of(theirs).keys()
    assert len(told) == 1


def test_keys_may_have_what_a_peft_model_puts_in_front_and_an_adapters_name():
    model = ours.get_peft_model(base(), LORA)
    state = ours.get_peft_model_state_dict(model)
    assert all(key.startswith("base_model.model.") for key in state)
    spelled = [state, {key.replace(".weight", ".default.weight"): each for key, each in state.items()}]
    spelled += [{f"_orig_mod.{key.removeprefix('base_model.model.')}": each for key, each in state.items()}]
    for each in spelled:
        made, told = injected(ours, LORA, each)
        assert (tensors_of(made).keys(), told) == (tensors_of(model).keys(), [])


def test_tensors_are_put_in_afterwards():
    state = {key: torch.ones_like(each) for key, each in keys_of(LORA).items()}
    made, _ = injected(ours, LORA, state)
    told = ours.set_peft_model_state_dict(made, state)
    assert (told.missing_keys, told.unexpected_keys) == ([], [])
    assert all(each.all() for each in tensors_of(made).values())


@pytest.mark.parametrize("library", [ours, peft], ids=["ours", "peft"])
def test_what_keys_do_not_tell_is_refused(library):
    named = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"])
    with pytest.raises(ValueError, match="target_parameters"):
        library.inject_adapter_in_model(named, base(), state_dict=keys_of(LORA))
    with pytest.raises(ValueError, match=r"adapts nothing|not found|No modules"):
        library.inject_adapter_in_model(LORA, nn.Sequential(nn.Linear(2, 2)), state_dict=keys_of(LORA))
    with pytest.raises(ValueError, match=r"adapts nothing|not found|No modules"):
        library.inject_adapter_in_model(LORA, base(), state_dict={})
