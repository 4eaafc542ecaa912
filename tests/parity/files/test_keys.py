"""Files whose keys other tools have spelled: peft's own state dicts, of wrapped models too, load to peft's outputs."""

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import CheckpointError
from peftc.runtime.peft_format.adapter_files import WEIGHTS
from tests import zoo
from tests.parity.cases.case import Case
from tests.parity.method_cases import CASES, batch, make_base, theirs

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def llama():
    return make_base("llama")


def rewrite(directory: Path, change, extra=None) -> None:
    file = directory / WEIGHTS
    save_file({change(key): value for key, value in load_file(file).items()} | (extra or {}), file)


def raw_keys(wrapped: nn.Module, state: nn.Module | None = None) -> dict[str, str]:
    """The key of each saved tensor in a state dict, of the wrapped model or of what holds it, found by its storage."""
    by_storage = {value.data_ptr(): key for key, value in (state or wrapped).state_dict().items()}
    saved = peft.get_peft_model_state_dict(wrapped)
    return {key: by_storage[value.data_ptr()] for key, value in saved.items() if value.data_ptr() in by_storage}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [each for each in CASES if "llama" in each.models], ids=lambda case: case.name)
def test_a_state_dict_of_every_method(case: Case, llama, tmp_path: Path) -> None:
    name, model, adapted = llama
    wrapped = theirs(case, name, model)
    wrapped.save_pretrained(tmp_path)
    keys = raw_keys(wrapped)
    assert any(".default" in key for key in keys.values())
    rewrite(tmp_path, lambda key: keys.get(key, key))
    inputs = batch()
    adapted.load_adapter(tmp_path, "loaded")
    try:
        with torch.no_grad():
            wanted = wrapped(**inputs).logits
            found = adapted(**inputs).logits
        assert_close(found, wanted, rtol=0, atol=case.tolerance * float(wanted.abs().max()))
    finally:
        adapted.delete_adapter("loaded")


def of_lora(**config):
    torch.manual_seed(0)
    model = zoo.make("llama", num_hidden_layers=2)
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | config
    return model, peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config)).eval()


def data_parallel(wrapped: nn.Module) -> nn.Module:
    return nn.DataParallel(wrapped)


def compiled(wrapped: nn.Module) -> nn.Module:
    return torch.compile(wrapped)  # nothing runs, so nothing is compiled


def compiled_inside(wrapped: nn.Module) -> nn.Module:
    wrapped.base_model.model = torch.compile(wrapped.base_model.model)
    return wrapped


def checkpointed_layers(wrapped: nn.Module) -> nn.Module:
    layers = wrapped.base_model.model.model.layers
    for place, layer in enumerate(layers):
        layers[place] = checkpoint_wrapper(layer)
    return wrapped


def both(wrapped: nn.Module) -> nn.Module:
    return nn.DataParallel(compiled(checkpointed_layers(wrapped)))


WRAPS = (data_parallel, compiled, compiled_inside, checkpointed_layers, both)


@pytest.mark.parametrize("extras", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["", "dora", "head"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_state_dicts_of_wrapped_models(wrap, extras, tmp_path: Path) -> None:
    model, wrapped = of_lora(**extras)
    with torch.no_grad():
        wanted = wrapped(**batch()).logits
    wrapped.save_pretrained(tmp_path)
    addresses = {value.data_ptr(): key for key, value in peft.get_peft_model_state_dict(wrapped).items()}
    state = wrap(wrapped).state_dict()
    keys = {addresses[value.data_ptr()]: key for key, value in state.items() if value.data_ptr() in addresses}
    rewrite(tmp_path, lambda key: keys.get(key, key))
    # checkpoint_wrapper takes its own name out of a state dict; files of other tools have it.
    if wrap is checkpointed_layers:
        rewrite(tmp_path, lambda key: key.replace("layers.0.", "layers.0._checkpoint_wrapped_module."))
    adapted = compiler.load(model, tmp_path).eval()
    with torch.no_grad():
        assert_close(adapted(**batch()).logits, wanted)
    adapted.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / WEIGHTS)) == set(addresses.values())


@pytest.mark.parametrize("kind", ["prompt", "prefix", "ptuning"])
@pytest.mark.parametrize("before", ["module.", "_orig_mod."])
def test_what_stands_in_front(kind: str, before: str, tmp_path: Path) -> None:
    configs = {
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "ptuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    }
    model = zoo.make("llama")
    peft.get_peft_model(copy.deepcopy(model), configs[kind]).save_pretrained(tmp_path)
    plain = compiler.load(model, tmp_path).eval()
    rewrite(tmp_path, lambda key: before + key)
    with torch.no_grad():
        wanted, found = plain(**batch()).logits, compiler.load(model, tmp_path).eval()(**batch()).logits
        assert torch.equal(found, wanted)
        assert not torch.equal(found, model(**batch()).logits)


class Holder(nn.Module):
    """A model with modules that are called as wrappers and adapters are."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 4)
        self.default = nn.ModuleDict({"module": nn.Linear(4, 4), "lora": nn.Linear(4, 4)})

    def forward(self, x):
        return self.default["lora"](self.default["module"](self.module(x)))


@pytest.mark.parametrize("before", ["", "module.", "_orig_mod.", "base_model.model."])
@pytest.mark.parametrize("named", [False, True])
def test_modules_that_are_called_like_wrappers(before: str, named: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Holder()
    config = peft.LoraConfig(target_modules=["module", "default.module", "lora"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    wrapped.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda key: before + (key.replace(".weight", ".default.weight") if named else key))
    x = torch.randn(2, 4)
    assert_close(compiler.load(model, tmp_path)(x), wrapped(x))


def saved(tmp_path: Path, **config):
    model, wrapped = of_lora(**config)
    wrapped.save_pretrained(tmp_path)
    return model, wrapped


def test_idle_tensors_are_told_once(tmp_path: Path) -> None:
    model, wrapped = saved(tmp_path)
    frequencies = {f"{PREFIX}model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}
    heads = {"v_head.summary.weight": torch.ones(1, 32), "module.v_head.summary.bias": torch.ones(1)}
    rewrite(tmp_path, lambda key: key, frequencies | heads)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted = compiler.load(model, tmp_path).eval()
    said = [str(each.message) for each in told if "left unread" in str(each.message)]
    assert len(said) == 1
    assert all(said[0].count(key) == 1 for key in (*frequencies, *heads))
    assert_close(adapted(**batch()).logits, wrapped(**batch()).logits)


def refused(model: nn.Module, tmp_path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        compiler.load(model, tmp_path)
    return str(caught.value)


def test_what_matters_is_refused_and_all_of_it_told(tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    unknown = {
        "module.base_model.model.model.layers.0.self_attn.z_proj.lora_A.default.weight": torch.ones(4, 32),
        "score.weight": torch.ones(2, 32),
        "v_head.lora_A.weight": torch.ones(4, 32),
    }
    rewrite(tmp_path, lambda key: key.replace("layers.1.", "layers.7."), unknown)
    text = refused(model, tmp_path)
    assert all(f"unexpected key '{key}'" in text for key in unknown)
    assert "layers.7.mlp.down_proj.lora_A.weight'" in text
    assert f"missing key '{PREFIX}model.layers.1.mlp.down_proj.lora_A.weight'" in text


@pytest.mark.parametrize("change", ["module.{}", "{}.two", "base_model.model.{}"])
def test_two_spellings_of_one_are_refused(change: str, tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    other = key.replace("lora_A", "lora_A.two") if change == "{}.two" else change.format(key)
    rewrite(tmp_path, lambda each: each, {other: torch.ones(4, 32)})
    text = refused(model, tmp_path)
    assert "E341" in text
    assert f"'{key}' is in the file twice, as '{min(key, other)}' and as '{max(key, other)}'" in text


def test_two_adapters_in_one_file(tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    twice = {key.replace("lora_A", f"lora_A.{name}"): torch.ones(4, 32) for name in ("one", "two")}
    file = tmp_path / WEIGHTS
    save_file({each: value for each, value in load_file(file).items() if each != key} | twice, file)
    assert "in the file twice" in refused(model, tmp_path)
