"""What a route's configuration says, and what is refused in it: all at once."""

import pytest
import torch
from safetensors.torch import save_file

from peftc.grammar.diagnostics import CheckpointError
from peftc.passes.foreign import peft_routes as names
from peftc.runtime.routing import saved_route
from peftc.runtime.routing.classifier import ClassifierSettings, ScalingClassifier
from peftc.runtime.routing.saved_route import fill, place_of, read_route, route_config, route_tensors

GOOD = {"peft_type": names.ROUTED_TYPE, "hidden_size": 6, "adapters": {"a": "x", "b": "y"}}


def test_both_ways():
    settings = ClassifierSettings(
        hidden_size=6, depth=2, size=7, dropout=0.1, by_place=True, softmax=False, temperature=2.0, top_k=1, weight=3.0
    )
    classifier = ScalingClassifier(settings, adapters=2, places=3)
    config = route_config(classifier, GOOD["adapters"])
    assert set(names.SETTINGS.values()) | {"peft_type", "adapters"} == set(config)
    read = read_route(config | {"task_type": "CAUSAL_LM"}, "here")
    assert (read.settings, dict(read.adapters), read.task_type) == (settings, GOOD["adapters"], "CAUSAL_LM")


def test_nulls_are_defaults():
    assert read_route(GOOD | {"top_k_lora": None, "softmax_temperature": None}, "here").settings == ClassifierSettings(
        6
    )


def test_all_that_is_wrong_at_once():
    wrong = {"top_k_lora": 3, "xlora_depth": 0, "xlora_dropout_p": 1, "softmax_temperature": 0, "enable_softmax": 1}
    with pytest.raises(CheckpointError) as error:
        read_route(GOOD | wrong | {"xlora_dept": 2}, "here")
    told = str(error.value)
    for name in (*wrong, "xlora_dept"):
        assert f"'{name}'" in told, name
    assert "from 1 to 2" in told
    assert "xlora_depth" in told.split("xlora_dept'")[1]
    for adapters in ({}, None, {"a": 1}, ["a"]):
        with pytest.raises(CheckpointError, match="adapters"):
            read_route(GOOD | {"adapters": adapters}, "here")


def test_unknown_fields_are_told_where_they_are_not_refused():
    with pytest.warns(UserWarning, match="xlora_dept"):
        read_route(GOOD | {"xlora_dept": 2}, "here", strict=False)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda held: held.pop(names.KEYS + "layers.0.bias"), "E340"),
        (lambda held: held.update({names.KEYS + "layers.2.bias": torch.ones(2)}), "E341"),
        (lambda held: held.update({names.KEYS + "layers.0.bias": torch.ones(5)}), "E342"),
    ],
)
def test_tensors_that_are_not_its(change, code):
    classifier = ScalingClassifier(ClassifierSettings(6), adapters=2, places=3)
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    held = {key: value + 1 for key, value in route_tensors(classifier, {}).items()}
    change(held)
    with pytest.raises(CheckpointError, match=code):
        fill(classifier, held, "here")
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())


def test_where_adapters_lie(tmp_path):
    saved, other = tmp_path / "saved", tmp_path / "other"
    for each in (saved / "a", saved / "b", other, saved / "below"):
        each.mkdir(parents=True)
    save_file({"base_model.model.q.lora_A.weight": torch.ones(1)}, saved / "a" / "adapter_model.safetensors")
    assert place_of(saved, "a", str(other)) == saved / "a"
    assert place_of(saved, "c", str(other)) == str(other)
    assert place_of(saved, "c", "below") == saved / "below"
    assert place_of(saved, "../other", "me/adapter") == "me/adapter"
    assert place_of(saved, "c", "../other") == "../other"
    save_file({names.WHOLE + "model.lm_head.weight": torch.ones(1)}, saved / "b" / "adapter_model.safetensors")
    assert place_of(saved, "b", str(other)) == str(other)
    with pytest.raises(CheckpointError, match="E302"):
        place_of(saved, "b", str(tmp_path / "gone"))
    assert saved_route.is_route(GOOD)
    assert not saved_route.is_route({"peft_type": "LORA"})
