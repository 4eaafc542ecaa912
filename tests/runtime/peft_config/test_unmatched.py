"""A name in a PEFT config that chooses nothing is told, and a weight that is named twice is refused."""

import copy
import functools
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftc import compiler
from peftc.compiler import CheckpointError

SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.head, self.lone = nn.Linear(4, 4), nn.Linear(4, 2), nn.Parameter(torch.ones(2, 2))

    def forward(self, x):
        return self.head(self.linear(x)) @ self.lone


class Held(nn.Module):
    """PEFT takes no parameter of the model itself."""

    def __init__(self):
        super().__init__()
        self.held = Net()

    def forward(self, x):
        return self.held(x)


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
    with pytest.warns(RuntimeWarning, match=f"the PEFT config: field {told}") as caught:
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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_ties_that_are_asked_for_are_there_or_told(tied, trained):
    base = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    asked = config(target_modules=["q_proj"], ensure_weight_tying=True)
    asked.modules_to_save = ["embed_tokens"] if trained else None
    if tied and trained:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapted = compiler.apply(base, asked)
        theirs = peft.get_peft_model(copy.deepcopy(base), asked)
        assert adapted.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    else:
        with pytest.warns(RuntimeWarning, match="'ensure_weight_tying': nothing that is adapted or trained is tied"):
            compiler.apply(base, asked)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_adapters_of_tied_modules_are_not_tied_without_a_word(modules):
    base = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match="E364"):
        compiler.apply(base, config(target_modules=modules, ensure_weight_tying=True))


APART = {
    "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "a head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "a trained embedding": {"modules_to_save": ["embed_tokens"]},
    "a trained head": {"modules_to_save": ["lm_head"]},
    "neither": {},
    "tokens, which are shared": {"trainable_token_indices": [1, 2]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("name", APART)
def test_what_is_adapted_apart_from_what_it_is_tied_to_is_told(name, added, tied):
    base = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    asked = config(**{"target_modules": ["q_proj"], **APART[name]})
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(asked))
    said = [each for each in theirs if "a tied layer is part of the adapter" in str(each.message)]
    adapted = compiler.apply(base, config(target_modules=["k_proj"])) if added else None
    with warnings.catch_warnings(record=True) as ours:
        warnings.simplefilter("always")
        adapted.add_adapter("other", asked) if added else compiler.apply(base, asked)
    told = [
        str(each.message) for each in ours if each.category is RuntimeWarning and "tied no more" in str(each.message)
    ]
    assert len(told) == len(said) == (tied and name not in ("neither", "tokens, which are shared"))
    assert all(("'ensure_weight_tying' = true keeps" in each) is ("trained" in name) for each in told)


def test_a_weight_is_not_named_twice():
    twice = config(target_parameters=["linear.weight"])
    with pytest.raises(ValueError, match="not also targeted with `target_modules`"):
        peft.get_peft_model(Net(), twice)
    for modules in (["linear"], ".*linear"):
        with pytest.raises(CheckpointError, match=r"E325.*the weight of 'linear' is named by 'target_parameters'"):
            compiler.apply(Net(), config(target_modules=modules, target_parameters=["linear.weight"]))


def test_a_module_that_is_left_out_may_be_named_by_its_weight():
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    fields = dict(target_parameters=["layers.0.self_attn.q_proj.weight"], target_modules=["q_proj"])
    for more in ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, {"layers_to_transform": [1]}):
        asked = config(**fields, **more)
        theirs = peft.get_peft_model(copy.deepcopy(base), asked)
        wanted = {key.partition(".self_attn")[0] for key, each in theirs.named_parameters() if each.requires_grad}
        assert len(wanted) == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapted = compiler.apply(base, asked)
        found = {at.site.name.partition(".self_attn")[0] for at in adapted.adapter_plan("default").sites}
        assert {f"base_model.model.{each}" for each in found} == wanted


@pytest.mark.parametrize("modules", [["linear", "head"], ".*(linear|head)", "all-linear", None])
@pytest.mark.parametrize("excluded", [["held.lone", "head"], ".*(lone|head)"])
def test_what_is_left_out_is_a_module_and_no_parameter(modules, excluded):
    asked = config(target_modules=modules, target_parameters=["lone"], exclude_modules=excluded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both say that nothing is called `lone` that could be left out
        theirs = peft.get_peft_model(Held(), copy.deepcopy(asked))
        adapted = compiler.apply(Held(), asked)
    wanted = theirs.base_model.targeted_module_names + theirs.base_model.targeted_parameter_names
    assert {at.site.name for at in adapted.adapter_plan("default").sites} == set(wanted)


def test_a_parameters_rank_is_no_modules():
    base = Net()
    asked = config(target_modules=[], target_parameters=["lone"], rank_pattern={"lone": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = compiler.apply(base, asked)
    assert next(iter(adapted.adapter_bank.parameters())).shape[0] == 1
