"""Files of older PEFTs: the config does not say which head is trained, and biases are not in the file."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import CheckpointError

WIDTHS = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
TEXT = dict(vocab_size=64, max_position_embeddings=40, pad_token_id=1, num_labels=3)
IDS = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(1))

MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**WIDTHS, **TEXT)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**WIDTHS, **TEXT)),
    "tokens": lambda: hf.RobertaForTokenClassification(hf.RobertaConfig(**WIDTHS, **TEXT)),
    "questions": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**WIDTHS, **{**TEXT, "num_labels": 2})),
    "llama": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**WIDTHS, **TEXT)),
    "two heads": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(dim=32, hidden_dim=48, n_layers=1, n_heads=4, **TEXT)
    ),
}

# What is adapted in which model, by which method, for which task.
CASES: dict[str, tuple[str, peft.PeftConfig]] = {
    "lora": ("bert", peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")),
    "a head of modules": ("roberta", peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")),
    "a head called score": ("llama", peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")),
    "heads by the end of their names": ("two heads", peft.LoraConfig(target_modules=["q_lin"], task_type="SEQ_CLS")),
    "tokens": ("tokens", peft.LoraConfig(target_modules=["query", "value"], task_type="TOKEN_CLS")),
    "questions": ("questions", peft.LoraConfig(target_modules=["query"], task_type="QUESTION_ANS")),
    "dora": ("roberta", peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS", use_dora=True)),
    "ia3": (
        "roberta",
        peft.IA3Config(
            target_modules=["key", "output.dense"], feedforward_modules=["output.dense"], task_type="SEQ_CLS"
        ),
    ),
    "ia3, tokens": (
        "tokens",
        peft.IA3Config(target_modules=["key"], feedforward_modules=[], task_type="TOKEN_CLS"),
    ),
    "adalora": (
        "bert",
        peft.AdaLoraConfig(target_modules=["query"], task_type="SEQ_CLS", init_r=4, target_r=2, total_step=10),
    ),
    "loha": ("roberta", peft.LoHaConfig(target_modules=["query"], task_type="SEQ_CLS")),
    "oft": ("bert", peft.OFTConfig(target_modules=["query"], task_type="SEQ_CLS", oft_block_size=8)),
    "ln_tuning": ("roberta", peft.LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS")),
    "bias all": ("roberta", peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS", bias="all")),
    "boft, bias all": (
        "bert",
        peft.BOFTConfig(target_modules=["query"], task_type="SEQ_CLS", boft_block_size=8, bias="all"),
    ),
}


def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=IDS)
    return found.logits if "logits" in found else torch.stack([found.start_logits, found.end_logits])


def stirred(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.add_(torch.randn(each.shape, generator=generator) * 0.3)
    return model


def written(model: Any, where: Path, *, without: Callable[[str], bool] = lambda key: False, **fields: Any) -> None:
    """Save as peft does, and make of it what an older one would have written."""
    model.save_pretrained(where)
    config = json.loads((where / "adapter_config.json").read_text())
    (where / "adapter_config.json").write_text(json.dumps(config | fields))
    tensors = load_file(where / "adapter_model.safetensors")
    save_file({key: each for key, each in tensors.items() if not without(key)}, where / "adapter_model.safetensors")


def theirs(name: str, where: Path, **options: Any) -> Any:
    return peft.PeftModel.from_pretrained(base(name), where, **options).eval()


def trained(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters() if each.requires_grad)


@pytest.mark.parametrize("case", CASES)
def test_a_head_that_only_the_task_names(case: str, tmp_path: Path) -> None:
    name, config = CASES[case]
    before, again = tmp_path / "before", tmp_path / "again"
    written(stirred(peft.get_peft_model(base(name), config)), before, modules_to_save=None)
    want = outputs(theirs(name, before))
    assert not torch.allclose(want, outputs(base(name)), atol=1e-2)
    adapted = compiler.load(base(name), before)
    assert_close(outputs(adapted), want, atol=1e-5, rtol=1e-4)
    adapted.save_pretrained(again)
    assert_close(outputs(theirs(name, again)), want, atol=1e-5, rtol=1e-4)
    assert_close(outputs(compiler.load(base(name), again)), want, atol=1e-5, rtol=1e-4)
    with adapted.disable_adapter():
        assert_close(outputs(adapted), outputs(base(name)))
    if case != "adalora":  # whose budget PEFT trains with something that is none of the adapter's
        going_on = compiler.load(base(name), before, is_trainable=True)
        assert trained(going_on) == trained(theirs(name, before, is_trainable=True))
        assert_close(outputs(going_on.merge_and_unload()), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "roberta", "tokens"])
def test_a_head_behind_a_prompt(name: str, tmp_path: Path) -> None:
    task = "TOKEN_CLS" if name == "tokens" else "SEQ_CLS"
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3)
    written(stirred(peft.get_peft_model(base(name), config)), tmp_path, modules_to_save=None)
    adapted = compiler.load(base(name), tmp_path, values={"peft_compatible": True})
    assert_close(outputs(adapted), outputs(theirs(name, tmp_path)), atol=1e-5, rtol=1e-4)


def test_a_spec_of_the_file_has_the_head(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    model = stirred(peft.get_peft_model(base("roberta"), config))
    written(model, tmp_path, modules_to_save=None)
    text = compiler.decompile(tmp_path)
    plan = compiler.apply(base("roberta"), text).adapter_plan("default")
    assert [each.module for each in plan.copies] == ["classifier"]


def test_a_head_named_in_the_config_and_by_the_task_is_trained_once(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["pooler"])
    written(stirred(peft.get_peft_model(base("bert"), config)), tmp_path, modules_to_save=["pooler"])
    adapted = compiler.load(base("bert"), tmp_path)
    assert_close(outputs(adapted), outputs(theirs("bert", tmp_path)), atol=1e-5, rtol=1e-4)
    assert [each.module for each in adapted.adapter_plan("default").copies] == ["bert.pooler", "classifier"]


def test_the_trained_head_learns(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    written(stirred(peft.get_peft_model(base("roberta"), config)), tmp_path, modules_to_save=None)
    adapted = compiler.load(base("roberta"), tmp_path, is_trainable=True).train()
    adapted(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    grads = {name: each.grad for name, each in adapted.named_parameters() if each.requires_grad}
    assert any("classifier" in name for name in grads)
    assert all(each is not None and each.abs().max() > 0 for each in grads.values())


def test_a_task_without_a_head_in_the_file_is_said(tmp_path: Path) -> None:
    """transformers writes such files: it puts an adapter into a model, and trains no head."""
    model: Any = base("bert")
    model.add_adapter(peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="the task is SEQ_CLS, and the file has no head of its own"):
        adapted = compiler.load(base("bert"), tmp_path)
    assert_close(outputs(adapted), outputs(model))
    assert not adapted.adapter_plan("default").copies


def test_a_head_that_is_adapted_is_not_trained_as_a_whole(tmp_path: Path) -> None:
    model: Any = base("bert")
    config = peft.LoraConfig(target_modules=["query", "classifier"], task_type="SEQ_CLS", init_lora_weights=False)
    model.add_adapter(config)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no head of its own"):
        adapted = compiler.load(base("bert"), tmp_path)
    assert_close(outputs(adapted), outputs(model))


@pytest.mark.parametrize("part", ["weight", "out_proj"])
def test_a_part_of_a_head_is_not_enough(part: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    model = peft.get_peft_model(base("roberta"), config)
    written(model, tmp_path, without=lambda key: "classifier" in key and part in key, modules_to_save=None)
    with pytest.raises(CheckpointError, match=f"E340.*missing key 'base_model.model.classifier.*{part}"):
        compiler.load(base("roberta"), tmp_path)


# --- biases that were lost ---


def without_biases(keys: Collection[str] = ()) -> Callable[[str], bool]:
    return lambda key: key.endswith("base_layer.bias") and (not keys or any(each in key for each in keys))


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_lost_biases_are_the_bases(task: str | None, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["query", "value"], bias="lora_only", task_type=task)
    before, again = tmp_path / "before", tmp_path / "again"
    written(stirred(peft.get_peft_model(base("roberta"), config)), before, without=without_biases())
    want = outputs(theirs("roberta", before))
    with pytest.warns(UserWarning, match="trained with its biases, and the file has none"):
        adapted = compiler.load(base("roberta"), before, is_trainable=True)
    assert_close(outputs(adapted), want, atol=1e-5, rtol=1e-4)
    assert trained(adapted) == trained(theirs("roberta", before, is_trainable=True))
    adapted.save_pretrained(again)
    assert_close(outputs(theirs("roberta", again)), want, atol=1e-5, rtol=1e-4)


def test_some_lost_biases_are_missing(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["query", "value"], bias="lora_only")
    written(peft.get_peft_model(base("roberta"), config), tmp_path, without=without_biases(["query"]))
    with pytest.raises(CheckpointError, match=r"E340.*missing key '.*query.base_layer.bias'"):
        compiler.load(base("roberta"), tmp_path)


# --- pickles ---


def test_a_pickle_with_a_head(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    stirred(model := peft.get_peft_model(base("bert"), config)).save_pretrained(tmp_path, safe_serialization=False)
    written_config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(written_config | {"modules_to_save": None}))
    with pytest.raises(CheckpointError, match=r"E306(.|\n)*allow_pickle=True"):
        compiler.load(base("bert"), tmp_path)
    assert_close(
        outputs(compiler.load(base("bert"), tmp_path, allow_pickle=True)), outputs(model), atol=1e-5, rtol=1e-4
    )
