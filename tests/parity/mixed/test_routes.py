"""X-LoRA against peft: outputs, generation, training, and checkpoints both ways."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from peftc import compiler
from peftc import peft as drop_in
from peftc.grammar.diagnostics import AdapterError, CheckpointError, UsageError
from peftc.passes.foreign.peft_routes import KEYS
from tests import zoo

IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "three layers, by place": {"xlora_depth": 3, "xlora_size": 16, "layerwise_scalings": True},
    "temperature and weight": {"softmax_temperature": 0.5, "global_scaling_weight": 1.5},
    "no softmax": {"enable_softmax": False},
    "best of three": {"top_k_lora": 1, "enable_softmax": False, "enable_softmax_topk": True},
    "a first pass with adapters": {"scaling_pass_value": 0.5, "top_k_lora": 2},
    "trained adapters": {"use_trainable_adapters": True},
}
every_option = pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))


def base(name: str) -> Any:
    return zoo.make(name, use_cache=False, num_hidden_layers=2).eval()


def config(places: Path, model: Any, options: dict[str, Any]) -> peft.XLoraConfig:
    adapters = {str(number): str(places / f"e{number}") for number in range(3)}
    return peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, adapters=adapters, **options)


def experts(places: Path, name: str) -> None:
    """Three of different ranks and at different places."""
    chosen = {"llama": ["q_proj", "down_proj", "v_proj"], "moe": ["q_proj", "o_proj", "k_proj"]}[name]
    for number in range(3):
        torch.manual_seed(number)
        targets = [chosen[0], chosen[1 if number else 2]]
        fresh = peft.LoraConfig(
            r=2 + number,
            target_modules=targets,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        peft.get_peft_model(base(name), fresh).save_pretrained(places / f"e{number}")


def pair(places: Path, name: str, options: dict[str, Any], ours: Callable[..., Any] = compiler.apply) -> Any:
    """peft's model and ours of the same classifier and adapters."""
    experts(places, name)
    theirs = peft.get_peft_model(base(name), config(places, base(name), options)).eval()
    own = ours(base(name), config(places, base(name), options)).eval()
    with torch.no_grad():
        for each in classifier(theirs).values():
            each.add_(0.3 * torch.randn_like(each))
    own.get_route().load_state_dict({key: value.detach() for key, value in classifier(theirs).items()})
    return theirs, own


def classifier(theirs: Any) -> dict[str, torch.Tensor]:
    start = "base_model.internal_xlora_classifier."
    return {key.removeprefix(start): each for key, each in theirs.named_parameters() if key.startswith(start)}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@every_option
@pytest.mark.parametrize("name", ["llama", "moe"])
def test_outputs(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    theirs, ours = pair(tmp_path, name, options)
    want = logits(theirs)
    assert (want - logits(base(name))).abs().max() > 0.01
    assert_close(logits(ours), want, atol=1e-5, rtol=1e-5)
    assert_close(ours.get_route().get_latest_scalings(), theirs.get_latest_scalings(), atol=1e-5, rtol=1e-5)
    more = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(ours.generate(input_ids=IDS, **more), theirs.generate(input_ids=IDS, **more))


@every_option
def test_twenty_steps(tmp_path: Path, options: dict[str, Any]) -> None:
    """Also which parameters have gradients; the classifier's dropout draws the same numbers."""
    losses, trained = [], []
    for model in pair(tmp_path, "llama", options):
        model.train()
        trained.append(sum(each.requires_grad for each in model.parameters()))
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        torch.manual_seed(3)
        own = []
        for _ in range(20):
            ids = torch.randint(3, 64, (2, 7))
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            own.append(loss.detach())
        losses.append(torch.stack(own))
    assert trained[0] == trained[1]
    assert losses[0].std() > 1e-3
    assert_close(losses[1], losses[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [OPTIONS["one layer"], OPTIONS["three layers, by place"]], ids=["one", "three"])
def test_checkpoints_both_ways(tmp_path: Path, options: dict[str, Any]) -> None:
    theirs, ours = pair(tmp_path, "llama", options)
    want = logits(theirs)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path / "ours")).eval()
    assert_close(logits(again), want, atol=1e-5, rtol=1e-5)
    shutil.move(tmp_path / "ours", tmp_path / "moved")  # adapters lie beside it
    for each in range(3):
        shutil.rmtree(tmp_path / f"e{each}")
    loaded = compiler.load(base("llama"), tmp_path / "moved")
    assert_close(logits(loaded), want, atol=1e-5, rtol=1e-5)
    assert not any(each.requires_grad for each in loaded.parameters())
    assert loaded.active_adapters == ["0", "1", "2"]
    assert type(loaded.peft_config["default"]) is peft.XLoraConfig
    assert loaded.peft_config["default"] is loaded.peft_config["default"]
    trained = compiler.load(base("llama"), tmp_path / "moved", is_trainable=True)
    assert {name for name, each in trained.named_parameters() if each.requires_grad} == {
        f"adapter_bank._route.{name}" for name, _ in trained.get_route().named_parameters()
    }


def test_what_peft_saves(tmp_path: Path) -> None:
    """Without the classifier's first layer, which peft leaves out, it is refused; adapters are where they were."""
    theirs, _ = pair(tmp_path, "llama", {})
    want = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    before = base("llama")
    with pytest.raises(CheckpointError, match="E340"):
        compiler.load(before, tmp_path / "theirs")
    tensors = {f"{KEYS}{key}": each.detach().clone() for key, each in classifier(theirs).items()}
    save_file(tensors, tmp_path / "theirs" / "adapter_model.safetensors")
    assert_close(logits(compiler.load(before, tmp_path / "theirs")), want, atol=1e-5, rtol=1e-5)
    shutil.move(tmp_path / "e1", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="E302"):
        compiler.load(before, tmp_path / "theirs")
    places = {"0": str(tmp_path / "e0"), "1": str(tmp_path / "elsewhere"), "2": str(tmp_path / "e2")}
    found = compiler.load(before, tmp_path / "theirs", config={"peft_type": "XLORA", "adapters": places})
    assert_close(logits(found), want, atol=1e-5, rtol=1e-5)


def test_beside_other_adapters(tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, "llama", {})
    ours.save_pretrained(tmp_path / "x")
    model = compiler.apply(base("llama"), "adapter own = lora { on k_proj }").eval()
    before = logits(model)
    model.load_adapter(tmp_path / "x")
    assert model.active_adapters == ["own"]
    assert_close(logits(model), before)
    model.set_adapter(["0", "1", "2"])
    assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="E536"):
        model.load_adapter(tmp_path / "x", adapter_name="another")
    with torch.no_grad():
        model.get_route().layers[0].weight.zero_()
    model.load_adapter(tmp_path / "x")  # as one that resumes has it
    assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    model.set_route(None)
    for name in ("0", "1", "2"):
        model.delete_adapter(name)
    added = copy.deepcopy(model)
    added.add_adapter(config(tmp_path, base("llama"), {}), "default")
    assert "default" in added.peft_config


def test_what_is_refused_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    _, ours = pair(tmp_path, "llama", {})
    ours.save_pretrained(tmp_path / "x")
    tensors = load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert set(tensors) == {f"{KEYS}layers.0.weight", f"{KEYS}layers.0.bias"}
    model = compiler.apply(base("llama"), "adapter own = lora { on k_proj }\nadapter other = ia3 { on k_proj }")
    before, state = model.active_adapters, set(model.state_dict())
    (tmp_path / "x" / "2" / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError):
        model.load_adapter(tmp_path / "x")
    assert (model.active_adapters, set(model.state_dict()), model.get_route()) == (before, state, None)
    with pytest.raises(AdapterError):
        model.add_adapter(config(tmp_path / "nowhere", base("llama"), {}), "default")
    assert (model.active_adapters, set(model.state_dict()), model.get_route()) == (before, state, None)


def test_a_file_that_is_refused_puts_no_value_in(tmp_path: Path) -> None:
    _, ours = pair(tmp_path, "llama", {})
    ours.save_pretrained(tmp_path / "x")
    place = tmp_path / "x" / "adapter_model.safetensors"
    tensors = load_file(place)
    ours.train()
    with torch.no_grad():
        for each in ours.adapter_bank.parameters():
            each.add_(1.0)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    for wrong in ("a key", "a config"):
        if wrong == "a key":
            save_file({key: each for key, each in tensors.items() if not key.endswith("bias")}, place)
        else:
            save_file(tensors, place)
            (tmp_path / "x" / "2" / "adapter_config.json").write_text("{")
        with pytest.raises(CheckpointError):
            ours.load_adapter(tmp_path / "x")
        assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
        assert all(each.training for each in ours.modules())


def test_modes_and_copies(tmp_path: Path) -> None:
    experts(tmp_path, "llama")
    model = compiler.apply(base("llama").train(), config(tmp_path, base("llama"), OPTIONS["three layers, by place"]))
    assert model.training
    assert model.get_route().training
    model(input_ids=IDS, labels=IDS).loss.backward()
    copied = copy.deepcopy(model).eval()
    assert copied.get_route().get_latest_scalings() is None
    assert model.get_route().get_latest_scalings() is not None
    assert_close(logits(copied), logits(model.eval()))
    with pytest.raises(UsageError, match=r"E536.*calibration"):
        compiler.apply(base("llama"), config(tmp_path, base("llama"), {}), calibration=[{"input_ids": IDS}])


def test_the_drop_in(tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, "llama", {}, drop_in.get_peft_model)
    assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    for name, given in (("set_topk_lora", 1), ("set_global_scaling_weight", 2.0), ("set_scaling_pass_value", 0.5)):
        for each in (theirs, ours):
            getattr(each, name)(given)
        assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    assert drop_in.XLoraConfig is peft.XLoraConfig
    plain = drop_in.get_peft_model(base("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AttributeError, match="set_topk_lora"):
        plain.set_topk_lora(1)


def test_a_route_in_python_is_told_not_to_be_saved(tmp_path: Path) -> None:
    model = compiler.apply(base("llama"), "adapter own = lora { on k_proj }")
    model.set_route(lambda input_ids: torch.ones(2, 1))
    with pytest.warns(UserWarning, match="not saved"):
        model.save_pretrained(tmp_path)
    assert compiler.load(base("llama"), tmp_path).active_adapters == ["default"]
