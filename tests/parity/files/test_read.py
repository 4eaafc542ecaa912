"""Checkpoints that peft wrote compute here what they compute there."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from peftc import compiler
from tests.matrix import wide

CAUSAL, CLASSIFY, TOKENS, SEQ2SEQ = "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM"

VARIATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", dict(target_modules=["q_proj", "v_proj", "down_proj"])),
    "llama-all-linear": ("llama", dict(target_modules="all-linear")),
    "llama-default-targets": ("llama", dict()),
    "llama-regex": ("llama", dict(target_modules=r".*layers\.1\..*(q_proj|up_proj)")),
    "llama-rslora": ("llama", dict(target_modules=["k_proj", "o_proj"], use_rslora=True)),
    "llama-patterns": (
        "llama",
        dict(
            target_modules=["q_proj", "v_proj", "up_proj"],
            rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8},
            alpha_pattern={"v_proj": 3, r"^model\.layers\.0\.self_attn\.q_proj": 20},
        ),
    ),
    "llama-some-layers": ("llama", dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[1])),
    "llama-layers-pattern": (
        "llama",
        dict(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers"),
    ),
    "llama-excluded": ("llama", dict(target_modules="all-linear", exclude_modules=["k_proj", "gate_proj"])),
    "llama-excluded-regex": ("llama", dict(target_modules=["q_proj", "k_proj"], exclude_modules=r".*layers\.0\..*")),
    "llama-whole-head": ("llama", dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "llama-whole-norm": ("llama", dict(target_modules=["q_proj"], modules_to_save=["norm", "input_layernorm"])),
    "llama-embedding": ("llama", dict(target_modules=["embed_tokens", "q_proj"])),
    "llama-head": ("llama", dict(target_modules=["lm_head", "v_proj"])),
    "tied": ("tied", dict(target_modules=["q_proj", "gate_proj"])),
    "tied-embedding": ("tied", dict(target_modules=["embed_tokens", "v_proj"])),
    "tied-head": ("tied", dict(target_modules=["lm_head", "v_proj"])),
    "tied-all-linear": ("tied", dict(target_modules="all-linear")),
    "gpt2": ("gpt2", dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "gpt2-bias": ("gpt2", dict(target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only")),
    "gpt2-bias-all": ("gpt2", dict(target_modules=["c_fc"], fan_in_fan_out=True, bias="all")),
    "gpt2-embedding": ("gpt2", dict(target_modules=["wte", "wpe", "c_attn"])),
    "bert": ("bert", dict(target_modules=["query", "value"], modules_to_save=["classifier"])),
    "bert-task": ("bert", dict(target_modules=["query", "dense"], task_type=CLASSIFY)),
    "bert-bias-all": ("bert", dict(target_modules=["query"], bias="all")),
    "bert-bias": ("bert", dict(target_modules=["key", "dense"], bias="lora_only", exclude_modules=["pooler.dense"])),
    "bert-embeddings": ("bert", dict(target_modules=["word_embeddings", "position_embeddings"])),
    "roberta": ("roberta", dict(target_modules=["query", "key"], task_type=TOKENS)),
    "roberta-all-linear": ("roberta", dict(target_modules="all-linear", use_rslora=True)),
    "t5": ("t5", dict(target_modules=["q", "v"], task_type=SEQ2SEQ)),
    "t5-more": ("t5", dict(target_modules=["k", "o", "wi", "wo"])),
    "t5-shared": ("t5", dict(target_modules=["shared", "q"])),
    "vit": ("vit", dict(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])),
    "vit-bias": ("vit", dict(target_modules="all-linear", bias="lora_only")),
    "moe": ("moe", dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])),
    "moe-both": (
        "moe",
        dict(target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ),
    "moe-all-linear": ("moe", dict(target_modules="all-linear")),
    "gemma3": ("gemma3", dict(target_modules="all-linear")),
    "mistral": ("mistral", dict(target_modules=["q_proj", "k_proj", "v_proj"])),
}


# Of these models another test reads or writes a file.
ELSEWHERE = ("gemma3", "mistral", "roberta")


@pytest.mark.parametrize("case", wide(VARIATIONS, [each for each in VARIATIONS if each not in ELSEWHERE]))
def test_peft_checkpoint(case: str, zoo: Any, tmp_path: Path) -> None:
    name, fields = VARIATIONS[case]
    theirs = zoo.peft(name, peft.LoraConfig(r=4, lora_alpha=6, **fields))
    theirs.save_pretrained(tmp_path)
    with zoo.hosted(name) as ours:
        ours.load_adapter(tmp_path)
        zoo.same(ours, theirs, name, base=zoo.model(name))
        keys = set(peft.get_peft_model_state_dict(theirs, save_embedding_layers=False))
        assert set(ours.adapter_state_dict("default")) == keys


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_load_makes_a_model(name: str, zoo: Any, tmp_path: Path) -> None:
    theirs = zoo.peft(name, peft.LoraConfig(r=4, target_modules="all-linear"))
    theirs.save_pretrained(tmp_path)
    model = zoo.model(name)
    before = zoo.snapshot(model)
    ours = compiler.load(model, tmp_path)
    assert isinstance(ours, type(model))
    assert not any(each.requires_grad for each in ours.parameters())
    zoo.same(ours, theirs, name, base=model)
    before.check()


def test_comparison_can_fail(zoo: Any, tmp_path: Path) -> None:
    theirs = zoo.peft("llama", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    with zoo.hosted("llama") as ours:
        ours.load_adapter(tmp_path)
        zoo.same(ours, theirs, "llama")
        parameter = next(each for name, each in ours.named_parameters() if "adapter_bank" in name)
        parameter[0, 0] += 0.5
        with pytest.raises(AssertionError):
            zoo.same(ours, theirs, "llama")


def test_named_adapter_in_its_subdirectory(zoo: Any, tmp_path: Path) -> None:
    theirs = zoo.peft("llama", peft.LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="style")
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "style" / "adapter_config.json").exists()
    with zoo.hosted("llama") as ours:
        ours.load_adapter(tmp_path, "loaded", subfolder="style")
        zoo.same(ours, theirs, "llama", base=zoo.model("llama"))


@pytest.mark.parametrize(
    ("dtype", "targets"),
    [(torch.bfloat16, "all-linear"), (torch.float16, ["embed_tokens", "q_proj", "down_proj"])],
)
def test_low_precision_base(dtype: torch.dtype, targets: Any, zoo: Any, tmp_path: Path) -> None:
    base = copy.deepcopy(zoo.model("llama")).to(dtype)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=targets)).eval()
    zoo.randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = compiler.load(base, tmp_path)
    adapters = [each for name, each in ours.named_parameters() if "adapter_bank" in name]
    assert {each.dtype for each in adapters} == {torch.float32}
    batch = zoo.batch("llama", 3, 8)
    got, wanted = zoo.logits(ours, batch), zoo.logits(theirs, batch)
    assert got.dtype == wanted.dtype == dtype
    # One rounding of the base's type is all that may lie between them.
    torch.testing.assert_close(got, wanted, atol=torch.finfo(dtype).eps * 8, rtol=torch.finfo(dtype).eps * 8)
    assert (got - zoo.logits(base, batch)).abs().max() > 0.05
