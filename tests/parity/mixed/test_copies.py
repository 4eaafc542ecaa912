"""Rows with trained copies and trained tokens of their own, against peft's model of each alone."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch.testing import assert_close

from peftc import compiler
from tests import zoo

COPIED: dict[str, tuple[str, dict[str, peft.PeftConfig]]] = {
    "heads": (
        "bert",
        {
            "a": peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]),
            "b": peft.LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"]),
            "c": peft.LoraConfig(r=3, target_modules=["key"]),
        },
    ),
    "norms": (
        "bert",
        {
            "a": peft.LNTuningConfig(target_modules=["LayerNorm"]),
            "b": peft.LoraConfig(r=4, target_modules=["query"]),
            "c": peft.LNTuningConfig(target_modules=["LayerNorm"]),
        },
    ),
    "root mean squares": (
        "llama",
        {
            "a": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
            "b": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
            "c": peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]),
        },
    ),
    "biases": (
        "bert",
        {
            "a": peft.LoraConfig(r=2, target_modules=["query", "value"], bias="lora_only"),
            "b": peft.LoraConfig(r=2, target_modules=["query"], bias="all"),
            "c": peft.LoraConfig(r=2, target_modules=["query"]),
        },
    ),
    "tokens": (
        "llama",
        {
            "a": peft.TrainableTokensConfig(token_indices=[3, 9, 20], target_modules=["embed_tokens"]),
            "b": peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [9, 40]}),
            "c": peft.LoraConfig(r=2, target_modules=["v_proj"]),
        },
    ),
    "tied tokens": (
        "gpt2",
        {
            "a": peft.TrainableTokensConfig(token_indices=[3, 9, 20], target_modules=["wte"]),
            "b": peft.LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices={"wte": [9, 40]}),
            "c": peft.LoraConfig(r=2, target_modules=["c_proj"]),
        },
    ),
}
NAMES = ["b", "a", "__base__", "c", "b"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", COPIED)
@torch.no_grad()
def test_rows_are_pefts(kind: str, tmp_path: Any) -> None:
    model, configs = COPIED[kind]
    base = zoo.make(model)
    single: dict[str, Any] = {"__base__": base}
    for name, config in configs.items():
        torch.manual_seed(ord(name))
        single[name] = peft.get_peft_model(copy.deepcopy(base), config).eval()
        for each in single[name].parameters():
            if each.requires_grad:
                each.add_(torch.randn_like(each) * 0.2)
        single[name].save_pretrained(tmp_path / name)
    ours = compiler.load(base, tmp_path / "a", adapter_name="a").eval()
    for name in ("b", "c"):
        ours.load_adapter(tmp_path / name, adapter_name=name)
    torch.manual_seed(0)
    ids = torch.randint(3, 64, (5, 8))
    ids[:, 1:4] = torch.tensor([9, 20, 40])
    mixed = ours(input_ids=ids, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        wanted = single[name](input_ids=ids[row : row + 1]).logits[0]
        assert_close(mixed[row], wanted, atol=2e-5 * float(wanted.abs().max()), rtol=0)
    if model != "bert":
        more = dict(max_new_tokens=4, min_new_tokens=4)
        tokens = ours.generate(input_ids=ids, adapter_names=NAMES, **more)
        for row, name in enumerate(NAMES):
            assert torch.equal(tokens[row : row + 1], single[name].generate(input_ids=ids[row : row + 1], **more)), name
