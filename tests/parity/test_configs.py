"""peft's config objects: the adapter of a config has peft's tensors, of peft's types, trained as peft trains them."""

import copy
import dataclasses
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from peftc import compiler
from peftc.compiler.api import adapt
from peftc.grammar.diagnostics import CheckpointError, SpecError
from tests.parity.cases.case import MODELS
from tests.parity.method_cases import CASES

FIRST = {case.method: case for case in reversed(CASES) if "llama" in case.models}


def _base(kind=torch.float32):
    torch.manual_seed(0)
    return MODELS["llama"]().to(kind)


@pytest.fixture(scope="module")
def host():
    return adapt(_base())


def _tensors(model):
    if isinstance(model, peft.PeftModel):
        model = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: tuple(value.shape) for key, value in model.items()}


MEASURED = {"eva"}  # here the batches are asked for at once, and every module keeps its rank
# What peft saves beside: copies of what sites share, zeros, sizes.
UNREAD = ("randlora_A", "randlora_B", ".zeros", "frod_s_size")


def _config(case):
    config = case.config(target_modules=case.targets_of("llama"))
    if "eva" in case.name:
        config.eva_config = peft.tuners.lora.config.EvaConfig(rho=1.0)
    return config


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if "llama" in case.models and case.method != "vblora_topk"],
    ids=lambda case: case.name,
)
def test_a_config_adapts_what_peft_adapts(case, host):
    config = _config(case)
    theirs = peft.get_peft_model(_base(), copy.deepcopy(config))
    batches = [{"input_ids": torch.randint(5, 60, (4, 40))}] if case.method in MEASURED or "eva" in case.name else None
    host.add_adapter(config, "default", calibration=batches)
    found = _tensors(host.adapter_state_dict("default"))
    trained = sum(each.numel() for each in host.adapter_bank.default.parameters() if each.requires_grad)
    host.delete_adapter("default")
    wanted = _tensors(theirs)
    assert found.items() <= wanted.items()
    assert all(any(part in key for part in UNREAD) for key in wanted.keys() - found.keys())
    assert trained == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(("kind", "widened"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)])
@pytest.mark.parametrize("method", [name for name in FIRST if name != "vblora_topk"])
def test_types_fresh_and_loaded(method, kind, widened, tmp_path):
    case = FIRST[method]
    config = _config(case)
    theirs = peft.get_peft_model(_base(kind), copy.deepcopy(config), autocast_adapter_dtype=widened)
    batches = [{"input_ids": torch.randint(5, 60, (4, 40))}] if method in MEASURED else None
    ours = compiler.apply(_base(kind), config, autocast_adapter_dtype=widened, calibration=batches)

    def types(model):
        return {each.dtype for each in model.parameters() if each.requires_grad}

    assert types(ours) == types(theirs)
    for again in (kind, torch.float32):  # what the file has does not matter
        ours.adapter_bank.to(again)
        ours.save_pretrained(tmp_path)
        loaded = compiler.load(_base(kind), tmp_path, autocast_adapter_dtype=widened, is_trainable=True)
        assert types(loaded) == types(theirs)


LLAMA = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
)
SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
DISTIL = DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_layers=2, n_heads=2)
CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
}
MODELS_WITH_HEADS = {
    "bert": (BertConfig(**SIZES), ["query"]),
    "distilbert": (DISTIL, ["q_lin"]),
    "llama": (LLAMA, ["q_proj"]),
}
HEADED = {
    "lora": lambda **k: peft.LoraConfig(r=2, **k),
    "lora, and another module": lambda **k: peft.LoraConfig(r=2, modules_to_save=["LayerNorm"], **k),
    "lora on all linear": lambda **k: peft.LoraConfig(r=2, **{**k, "target_modules": "all-linear"}),
    "loha": lambda **k: peft.LoHaConfig(r=2, **k),
    "prompt": lambda target_modules, **k: peft.PromptTuningConfig(num_virtual_tokens=2, **k),
}


def _headed(model, task):
    torch.manual_seed(0)
    made = CLASSES[task].from_config(copy.deepcopy(MODELS_WITH_HEADS[model][0]))
    return made.eval()


def _pairs():
    for model in MODELS_WITH_HEADS:
        for task in CLASSES:
            for how in HEADED:
                if how == "lora" or (model, task) == ("bert", "SEQ_CLS"):
                    yield pytest.param(model, task, how, id=f"{model}-{task}-{how}")


@pytest.mark.parametrize(("model", "task", "how"), _pairs())
def test_heads_of_the_task_are_trained_and_saved(model, task, how, tmp_path):
    config = HEADED[how](task_type=task, target_modules=MODELS_WITH_HEADS[model][1])
    theirs = peft.get_peft_model(_headed(model, task), copy.deepcopy(config))
    theirs.save_pretrained(tmp_path / "theirs")
    wanted, fields = load_file(tmp_path / "theirs/adapter_model.safetensors"), _fields(tmp_path / "theirs")
    base = _headed(model, task)
    added = compiler.apply(base, "adapter seed = lora(rank = 1) { on all linear }")
    added.add_adapter("default", peft_config=config.to_dict())
    added.delete_adapter("seed")
    for ours in (compiler.apply(base, config), added):
        assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
        torch.manual_seed(1)
        with torch.no_grad():
            for each in ours.parameters():
                if each.requires_grad:
                    each.add_(torch.randn_like(each) * 0.3)
        ours.save_pretrained(tmp_path / "ours")
        assert _tensors(load_file(tmp_path / "ours/adapter_model.safetensors")) == _tensors(wanted)
        written = _fields(tmp_path / "ours")
        assert written["task_type"] == task
        assert set(fields["modules_to_save"]) <= set(written["modules_to_save"])
        again = peft.PeftModel.from_pretrained(_headed(model, task), tmp_path / "ours").eval()
        assert type(again).__name__ != "PeftModel"
        ids = torch.tensor([[2, 5, 9, 17, 3]])
        with torch.no_grad():
            for one, other in zip(_outputs(ours.eval()(ids)), _outputs(again(input_ids=ids)), strict=True):
                torch.testing.assert_close(one, other[:, -one.shape[1] :], atol=1e-5, rtol=1e-5)
        reloaded = compiler.load(base, tmp_path / "ours", is_trainable=True)
        assert reloaded.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


def _fields(directory):
    return json.loads((directory / "adapter_config.json").read_text())


def _outputs(output):
    return [value for name, value in output.items() if "logits" in name]


@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"])
def test_without_a_task_that_has_heads_none_is_trained(task, tmp_path):
    ours = compiler.apply(_headed("bert", "SEQ_CLS"), peft.LoraConfig(r=2, target_modules=["query"], task_type=task))
    assert not any("classifier" in name for name, each in ours.named_parameters() if each.requires_grad)
    ours.save_pretrained(tmp_path)
    assert _fields(tmp_path)["task_type"] == task


def test_a_spec_trains_no_head_unasked(tmp_path):
    ours = compiler.apply(_headed("bert", "SEQ_CLS"), "adapter a = lora(rank = 2) { on query }")
    assert not any("classifier" in name for name, each in ours.named_parameters() if each.requires_grad)
    ours.save_pretrained(tmp_path)
    assert not _fields(tmp_path)["modules_to_save"]


def test_each_adapter_keeps_its_own_task(tmp_path):
    def config(task):
        return peft.LoraConfig(r=2, target_modules=["query"], task_type=task)

    ours = compiler.apply(_headed("bert", "SEQ_CLS"), {"a": config("FEATURE_EXTRACTION"), "b": config("SEQ_CLS")})
    ours.add_adapter("adapter c = lora(rank = 2) { on query }")
    ours.save_pretrained(tmp_path)
    assert {name: _fields(tmp_path / name)["task_type"] for name in "abc"} == {
        "a": "FEATURE_EXTRACTION",
        "b": "SEQ_CLS",
        "c": None,
    }
    ours.delete_adapter("b")
    ours.add_adapter("adapter b = lora(rank = 2) { on query }")
    ours.save_pretrained(tmp_path / "after")
    assert _fields(tmp_path / "after/b")["task_type"] is None


@pytest.mark.parametrize(
    "more", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["pooler"]}, {"layers_to_transform": [1]}]
)
@pytest.mark.parametrize("kind", [peft.LoraConfig, peft.LoHaConfig, peft.IA3Config])
def test_where_no_modules_are_named_the_usual_ones_are_adapted_too(kind, more):
    if "layers_to_transform" in more and not hasattr(kind(), "layers_to_transform"):
        pytest.skip("the method has no such field")
    theirs = peft.get_peft_model(_headed("bert", "SEQ_CLS"), kind(**copy.deepcopy(more)))
    ours = compiler.apply(_headed("bert", "SEQ_CLS"), kind(**more))
    assert _tensors(ours.adapter_state_dict("default")) == _tensors(theirs)


def test_without_usual_modules_they_have_to_be_named():
    with pytest.raises(SpecError, match="E221"):
        compiler.apply(torch.nn.Sequential(torch.nn.Linear(2, 2)), peft.LoraConfig(modules_to_save=["0"]))


@pytest.mark.parametrize("patterns", [None, "layer", ["encoder", "layer"]])
def test_layers_of_the_usual_modules(patterns):
    more = dict(layers_to_transform=1, layers_pattern=patterns)
    theirs = peft.get_peft_model(_headed("bert", "SEQ_CLS"), peft.LoraConfig(**more))
    ours = compiler.apply(_headed("bert", "SEQ_CLS"), peft.LoraConfig(**more))
    assert _tensors(ours.adapter_state_dict("default")) == _tensors(theirs)
    assert all(".layer.1." in key for key in ours.adapter_state_dict("default"))


SIZES_TOLD = {
    "layers": (dict(num_layers=7), "'num_layers'"),
    "width": (dict(token_dim=7), "'token_dim'"),
    "heads": (dict(num_attention_heads=7), "'num_attention_heads'"),
    "all of the queries'": (dict(num_layers=2, token_dim=16, num_attention_heads=2), None),
}


@pytest.mark.parametrize("told", SIZES_TOLD)
def test_sizes_that_are_not_the_models(told):
    said, field = SIZES_TOLD[told]
    base = LlamaForCausalLM(LLAMA)
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", **said)
    adapted = compiler.apply(base, "adapter a = lora(rank = 1) { on q_proj }")
    for put in (lambda: compiler.apply(base, config), lambda: adapted.add_adapter(config, "b")):
        if field is None:
            put()
            continue
        with pytest.raises(CheckpointError, match=r"E322.*" + field):
            put()
    assert list(adapted.adapter_bank._modules) == (["a", "b"] if field is None else ["a"])


def test_a_head_for_inference_is_not_trained():
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", inference_mode=True)
    ours = compiler.apply(_headed("bert", "SEQ_CLS"), config)
    assert not any(each.requires_grad for each in ours.parameters())
    assert any("classifier" in name for name, _ in ours.adapter_bank.named_parameters())
    assert dataclasses.asdict(config)["modules_to_save"] is None  # theirs is changed by peft, and by nobody here
