"""What users say adapters are: every form, in every order, and what is none."""

import peft
import pytest
import torch
from torch import nn

from peftc import compiler
from peftc.grammar.diagnostics import AdapterError, CheckpointError, SpecError, UsageError
from peftc.grammar.spec.elaborate import read_spec
from peftc.runtime.model.described import config_and_name, described, one_adapter

TEXT = "adapter a = lora(rank = 3) { on first }"
CONFIG = peft.LoraConfig(r=3, target_modules=["first"])
FIELDS = {"peft_type": "LORA", "r": 3, "target_modules": ["first"]}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


def form(name, tmp_path):
    file = tmp_path / "some.adapter"
    file.write_text(TEXT)
    return {
        "text": TEXT,
        "path": file,
        "path as a text": str(file),
        "spec": read_spec(TEXT),
        "adapter spec": read_spec(TEXT).adapters[0],
        "config": CONFIG,
        "fields": FIELDS,
        "fields of a config": CONFIG.to_dict(),
    }[name]


FORMS = ("text", "path", "path as a text", "spec", "adapter spec", "config", "fields", "fields of a config")


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_same_adapter(name, model, tmp_path):
    said = form(name, tmp_path)
    own = "default" if name in ("config", "fields", "fields of a config") else "a"
    adapted = compiler.apply(model, said)
    assert adapted.active_adapters() == [own]
    adapted.add_adapter(said, "beside")
    adapted.add_adapter("turned", said) if not isinstance(said, str) else adapted.add_adapter(said, "turned")
    named = compiler.apply(model, {"one": said, "two": said})
    for name_here, each in ((own, adapted), ("beside", adapted), ("turned", adapted), ("one", named), ("two", named)):
        state = each.adapter_state_dict(name_here)
        assert {key: tuple(value.shape) for key, value in state.items()} == {
            "base_model.model.first.lora_A.weight": (3, 6),
            "base_model.model.first.lora_B.weight": (6, 3),
        }
    assert named.active_adapters() == ["one"]
    assert [name for name, each in named.named_parameters() if each.requires_grad] == [
        "adapter_bank.one.first.A",
        "adapter_bank.one.first.B",
    ]


def test_a_mapping_may_mix_forms(model, tmp_path):
    said = {name: form(name, tmp_path) for name in FORMS}
    adapted = compiler.apply(model, {name.replace(" ", "_"): each for name, each in said.items()})
    assert adapted.active_adapters() == ["text"]
    for name in FORMS:
        adapted.set_adapter(name.replace(" ", "_"))


def test_a_mapping_of_names_may_name_adapters_like_fields(model):
    adapted = compiler.apply(model, {"r": CONFIG, "rank_pattern": FIELDS})
    assert set(adapted.adapter_bank._modules) == {"r", "rank_pattern"}


ORDERS = {
    "transformers'": ((CONFIG, "other"), {}),
    "peft's": (("other", CONFIG), {}),
    "peft's keywords": ((), {"adapter_name": "other", "peft_config": CONFIG}),
    "transformers' keywords": ((), {"adapter_name": "other", "adapter_config": CONFIG}),
    "name, config by keyword": (("other",), {"peft_config": CONFIG}),
    "config, name by keyword": ((CONFIG,), {"adapter_name": "other"}),
    "peft's, all of it": (("other", CONFIG, False, True), {}),
    "a text last": (("other", TEXT), {}),
    "a text first": ((TEXT, "other"), {}),
    "a text by keyword": ((), {"adapter_name": "other", "peft_config": TEXT}),
    "a mapping": (({"other": CONFIG},), {}),
}


@pytest.mark.parametrize("order", ORDERS)
def test_config_and_name_in_any_order(order, model):
    adapted = compiler.apply(model, "adapter seed = lora(rank = 1) { on second }")
    positional, named = ORDERS[order]
    adapted.add_adapter(*positional, **named)
    in_pefts_way = bool({"peft_config"} & named.keys()) or positional[:1] == ("other",)
    assert adapted.active_adapters() == ["seed" if in_pefts_way else "other"]
    assert "base_model.model.first.lora_A.weight" in adapted.adapter_state_dict("other")


MISUSES = {
    "nothing": ((), {}, "no config is given"),
    "a name alone": ((), {"adapter_name": "other"}, "'other' is a name, and no spec"),
    "a name in front": (("other",), {}, "'other' is a name, and no spec"),
    "two names": (
        ("other", "third"),
        {"peft_config": CONFIG},
        "two names are given for one adapter: 'other' and 'third'",
    ),
    "two configs": ((CONFIG, FIELDS), {}, "two configs"),
    "two configs, one by keyword": ((CONFIG, "x"), {"peft_config": CONFIG}, "two configs"),
    "a name of another type": ((CONFIG, 3), {}, "two configs"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_arguments_that_are_missing_or_said_twice(misuse, model):
    positional, named, message = MISUSES[misuse]
    adapted = compiler.apply(model, "adapter seed = lora(rank = 1) { on second }")
    with pytest.raises(UsageError, match="E597") as caught:
        adapted.add_adapter(*positional, **named)
    assert isinstance(caught.value, TypeError)
    assert message in str(caught.value)
    assert list(adapted.adapter_bank._modules) == ["seed"]


@pytest.mark.parametrize("wrong", [3, None, [CONFIG], object(), peft.LoraConfig, nn.Linear(2, 2), {1: CONFIG}, b"text"])
def test_a_value_of_another_type(wrong, model):
    for put in (lambda: compiler.apply(model, wrong), lambda: described(wrong), lambda: one_adapter(wrong, "a")):
        with pytest.raises(UsageError, match=r"E519.*does not describe an adapter") as caught:
            put()
        assert isinstance(caught.value, TypeError)
        assert "a PEFT config" in caught.value.diagnostics[0].help


def test_a_value_of_another_type_among_others(model):
    with pytest.raises(TypeError, match="type int does not describe"):
        compiler.apply(model, {"one": CONFIG, "two": 3})


def test_fields_without_a_type(model):
    with pytest.raises(CheckpointError, match="no field 'peft_type'"):
        compiler.apply(model, {"r": 3, "target_modules": ["first"]})


def test_two_specs_that_demand_different_things_of_the_base(model):
    one = 'base { regions = "modules" }\nadapter a = lora(rank = 2) { on first }'
    assert described({"x": one, "y": one, "z": CONFIG}).spec.regions == "modules"
    with pytest.raises(UsageError, match="E596"):
        described({"x": one, "y": one.replace("modules", "layers")})
    adapted = compiler.apply(model, {"x": one, "y": CONFIG})
    assert adapted._adapter_state.regions == "modules"


@pytest.mark.parametrize("wrong", [{"r": "four"}, {"unheard_of": 1}, {"bias": "some"}, {"target_modules": ["nothing"]}])
def test_what_is_refused_leaves_everything_as_it_was(wrong, model):
    adapted = compiler.apply(model, TEXT)
    with pytest.raises(AdapterError):
        compiler.apply(model, FIELDS | wrong)
    with pytest.raises(AdapterError):
        adapted.add_adapter(FIELDS | wrong, "b")
    assert list(adapted.adapter_bank._modules) == ["a"]
    assert adapted.active_adapters() == ["a"]


def test_sets_and_enums_are_what_a_file_has():
    config = peft.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, target_modules={"b", "a"}, exclude_modules={"c"})
    facts = described(config).facts["default"]
    assert type(facts.task_type) is str
    assert facts.task_type == "CAUSAL_LM"
    assert described(config).spec == described(config.to_dict()).spec


def test_an_adapter_for_inference_is_not_trained(model):
    frozen = peft.LoraConfig(r=3, target_modules=["first"], inference_mode=True, modules_to_save=["second"])
    adapted = compiler.apply(model, frozen)
    assert adapted.active_adapters() == ["default"]
    assert not any(each.requires_grad for each in adapted.parameters())
    adapted.add_adapter(CONFIG, "trained")
    assert any(each.requires_grad for each in adapted.adapter_bank.trained.parameters())
    adapted.add_adapter(frozen, "again")
    assert not any(each.requires_grad for each in adapted.parameters())


def test_what_a_spec_says_of_a_weight_stays(model):
    adapted = compiler.apply(model, {"x": 'adapter a = lora(rank = 2, init = "random") { on first }\nactivate 0.5 * a'})
    assert adapted._adapter_state.active == (("x", 0.5),)


def test_modules_of_an_own_mapping_are_refused_by_name(model):
    config = peft.LoraConfig(target_modules=["first"])
    config._register_custom_module({nn.Linear: nn.Linear})
    with pytest.raises(CheckpointError, match="_custom_modules"):
        compiler.apply(model, config)


def test_names_and_specs_are_told_apart(tmp_path):
    assert config_and_name(TEXT, None) == (TEXT, None)
    file = tmp_path / "spec"
    file.write_text(TEXT)
    assert config_and_name("name", str(file)) == (str(file), "name")
    with pytest.raises(SpecError):
        described("no spec")


def test_a_combination_is_not_one_adapter(model):
    """`add_adapter` adds one that is fresh; what a spec makes of others is not passed over."""
    alone = "adapter a = lora(rank = 2) { on first } adapter both = combine(a)"
    adapted = compiler.apply(model, "adapter start = lora(rank = 2) { on second }")
    for name, message in ((None, "not one adapter but a, both"), ("both", "made of others"), ("c", "no adapter 'c'")):
        with pytest.raises(UsageError, match=message) as caught:
            adapted.add_adapter(alone, name)
        assert caught.value.diagnostics[0].code == "E518"
    adapted.add_adapter(alone, "a")
    assert adapted._adapter_state.names() == ("start", "a")
