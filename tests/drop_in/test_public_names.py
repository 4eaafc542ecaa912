"""Every public name of PEFT's is here, or says why not; and docs/from-peft.md tells the same."""

import runpy
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from peftc import compiler
from peftc import peft as ours
from peftc.grammar.diagnostics import ArgumentTypeError, UsageError
from peftc.peft.refused import REFUSED

ROOT = Path(__file__).parents[2]
MAKER = runpy.run_path(str(ROOT / "docs" / "make_names.py"))


def test_the_page_is_new():
    text = MAKER["PAGE"].read_text(encoding="utf-8")
    assert MAKER["page"](text) == text, "run python docs/make_names.py"


def test_every_name_is_told():
    told = dict(MAKER["names"]())
    assert told.keys() == set(peft.__all__)
    assert all(what in ("same",) or what.startswith(("differs: ", "refused: ")) for what in told.values())
    assert {name for name, what in told.items() if what == "same"} >= {"LoraConfig", "TaskType", "get_layer_status"}
    assert "ours" not in REFUSED.keys() & {name for name, what in told.items() if not what.startswith("refused")}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_says_why(name):
    with pytest.raises(AttributeError, match=f"peftc.peft has no {name}: "):
        getattr(ours, name)


def test_a_name_that_nobody_has():
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        ours.no_such_name  # noqa: B018


def test_configurations_are_pefts_own():
    assert ours.LoraConfig is peft.LoraConfig
    assert ours.PeftConfig is peft.PeftConfig
    assert ours.PromptTuningInit is peft.PromptTuningInit
    assert {each.value for each in ours.TaskType} == {each.value for each in peft.TaskType}
    assert ours.TaskType.CAUSAL_LM == peft.TaskType.CAUSAL_LM


def test_all_tuners_are_refused():
    tuners = [name for name in peft.__all__ if name.endswith("Model") and not name.startswith(("Peft", "AutoPeft"))]
    assert len(tuners) > 30
    for name in tuners:
        with pytest.raises(AttributeError, match="one class of adapted models"):
            getattr(ours, name)


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    config = ours.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    return ours.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), config).eval()


X = torch.linspace(-1, 1, 8).reshape(2, 4)
SIZES = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_an_adapted_model_is_pefts_and_has_nothing_of_it(adapted):
    assert isinstance(adapted, ours.PeftModel)
    assert isinstance(adapted, peft.PeftModel)
    assert isinstance(adapted, nn.Sequential)
    assert issubclass(type(adapted), peft.PeftModel)
    found = {name for name in vars(peft.PeftModel) if not name.startswith("__") and hasattr(adapted, name)}
    for name in found:
        owner = next(kind for kind in type(adapted).__mro__ if name in vars(kind))
        assert owner is not peft.PeftModel, name
    assert not hasattr(adapted, "generate")
    with pytest.raises(AttributeError):
        adapted.get_prompt  # noqa: B018


def test_what_is_added_rests(adapted):
    before = adapted(X)
    adapted.add_adapter("second", ours.LoraConfig(r=2, target_modules=["1"], init_lora_weights=False))
    assert adapted.active_adapters == ["default"]
    assert torch.equal(adapted(X), before)
    trained = {name for name, each in adapted.named_parameters() if each.requires_grad}
    assert trained == {name for name, _ in adapted.named_parameters() if ".default." in name}
    adapted.set_adapter("second")
    assert not torch.allclose(adapted(X), before)


def test_a_model_may_be_made_by_its_class():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4))
    made = ours.PeftModel(base, ours.LoraConfig(r=2, target_modules=["0"]), "mine")
    assert list(made.peft_config) == ["mine"]
    assert torch.equal(made(X), base(X))


def test_the_task_says_the_class():
    for task, kind in {"SEQ_CLS": ours.PeftModelForSequenceClassification, None: ours.PeftModel}.items():
        made = ours.get_peft_model(
            nn.Sequential(nn.Linear(4, 4)), ours.LoraConfig(target_modules=["0"], task_type=task)
        )
        assert isinstance(made, kind)
        assert isinstance(made, nn.Sequential)
    assert not isinstance(made, ours.PeftModelForSequenceClassification)


def test_another_file_takes_an_adapters_place(adapted, tmp_path):
    """Of another rank too; what is refused leaves everything as it was."""
    base = adapted.unload()
    config = ours.LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights=False)
    other = ours.get_peft_model(base, config).eval()
    other.save_pretrained(tmp_path / "other")
    adapted.add_adapter("second", ours.LoraConfig(r=2, target_modules=["1"]))
    ours.hotswap_adapter(adapted, tmp_path / "other", "default")
    assert adapted.active_adapters == ["default"]
    assert set(adapted.peft_config) == {"default", "second"}
    torch.testing.assert_close(adapted(X), other(X))
    before = adapted(X)
    with pytest.raises(ValueError, match="no such directory"):
        ours.hotswap_adapter(adapted, tmp_path / "nothing", "default")
    assert torch.equal(adapted(X), before)
    assert adapted.active_adapters == ["default"]


def test_a_base_is_prepared_and_not_changed():
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    prepared = ours.prepare_model_for_kbit_training(base)
    assert prepared is not base
    assert all(each.requires_grad for each in base.parameters())
    assert not any(each.requires_grad for each in prepared.parameters())
    assert prepared.is_gradient_checkpointing
    assert not base.is_gradient_checkpointing
    model = ours.get_peft_model(prepared, ours.LoraConfig(r=2, target_modules=["q_proj"])).train()
    assert model.is_gradient_checkpointing
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("function", [ours.get_layer_status, ours.get_model_status, ours.get_peft_model_state_dict])
def test_functions_want_an_adapted_model(function):
    with pytest.raises(ArgumentTypeError, match="E595"):
        function(nn.Linear(2, 2))


def test_what_pefts_arguments_ask_for_is_refused(tmp_path):
    base = nn.Sequential(nn.Linear(4, 4))
    compiler.apply(base, "adapter default = lora(rank = 1) { on all linear }").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="E598"):
        ours.PeftModel.from_pretrained(base, tmp_path, ephemeral_gpu_offload=True)


def test_the_base_is_found_by_the_file(tmp_path):
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).save_pretrained(tmp_path / "base")
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    config = ours.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = ours.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 2, 3]])
    for kind in (ours.AutoPeftModelForCausalLM, ours.AutoPeftModel):
        found = kind.from_pretrained(tmp_path / "adapter").eval()
        assert isinstance(found, ours.PeftModelForCausalLM)
        torch.testing.assert_close(found(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(OSError, match="is not made, but loaded"):
        ours.AutoPeftModel()


def test_patterns_rename_keys(tmp_path):
    torch.manual_seed(0)
    base, renamed = nn.Sequential(nn.Linear(4, 4)), nn.ModuleDict()
    adapted = ours.get_peft_model(base, ours.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = base[0]

        def forward(self, x):
            return self.first(x)

    del renamed
    config = (tmp_path / "adapter_config.json").read_text().replace('"0"', '"first"')
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(ValueError, match="E340"):
        ours.PeftModel.from_pretrained(Named(), tmp_path)
    found = ours.PeftModel.from_pretrained(Named(), tmp_path, key_mapping={r"^0\.": "first."}).eval()
    assert torch.equal(found(X), adapted(X))
