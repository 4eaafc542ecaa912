"""Checkpoints written here compute in peft and in transformers what they compute here."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from peftc import compiler
from tests.matrix import wide

SPECS: dict[str, tuple[str, str]] = {
    "llama": ("llama", "adapter a = lora(rank = 4, alpha = 6) { on layers[*].self_attn.{q_proj, v_proj} }"),
    "llama-ranks": (
        "llama",
        """
        adapter a = lora(rank = 4, alpha = 6) {
            on layers[*].self_attn.{q_proj, v_proj}
            on layers[-1..].mlp.{up_proj, down_proj} with rank = 8, alpha = 3
            skip layers[0].self_attn.v_proj
        }
        """,
    ),
    "llama-rslora": ("llama", "adapter a = lora(rank = 4, rslora = true) { on all linear }"),
    "llama-default": ("llama", "adapter a = lora(rank = 2)"),
    "llama-train": ("llama", "adapter a = lora(rank = 4) { on q_proj  train lm_head, norm }"),
    "llama-embedding": ("llama", "adapter a = lora(rank = 4) { on embed_tokens, down_proj }"),
    "llama-regex": ("llama", 'adapter a = lora(rank = 4) { on ".*layers.1.*(k|o)_proj" }'),
    "tied-embedding": ("tied", "adapter a = lora(rank = 4) { on embed_tokens, q_proj }"),
    "tied-head": ("tied", "adapter a = lora(rank = 4) { on lm_head, q_proj }"),
    "gpt2": ("gpt2", "adapter a = lora(rank = 4, alpha = 9) { on c_attn, c_proj, wte }"),
    "bert": ("bert", "adapter a = lora(rank = 4) { on query, value  train classifier }"),
    "roberta": ("roberta", "adapter a = lora(rank = 4) { on all linear  train classifier }"),
    "t5": ("t5", "adapter a = lora(rank = 4) { on q, v, wo }"),
    "vit": ("vit", "adapter a = lora(rank = 4) { on all linear  train classifier }"),
    "moe": ("moe", "adapter a = lora(rank = 4) { on q_proj  on mlp.experts.{gate_up_proj, down_proj} }"),
    "gemma3": ("gemma3", "adapter a = lora(rank = 4) { on all linear }"),
    "mistral": ("mistral", "adapter a = lora(rank = 4) { on all linear }"),
}


# Of these models another test reads or writes a file.
ELSEWHERE = ("gemma3", "mistral", "roberta")


@pytest.mark.parametrize("case", wide(SPECS, [each for each in SPECS if each not in ELSEWHERE]))
def test_peft_and_transformers_load_what_we_save(case: str, zoo: Any, tmp_path: Path) -> None:
    name, spec = SPECS[case]
    base = zoo.model(name)
    with zoo.hosted(name) as ours:
        ours.add_adapter(spec)
        zoo.same(ours, ours, name)
        zoo.randomise(ours)
        ours.save_pretrained(tmp_path)
        zoo.same(ours, zoo.reference(name, tmp_path), name, base=base)
        theirs = copy.deepcopy(base)
        theirs.load_adapter(str(tmp_path))
        zoo.same(ours, theirs.eval(), name)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "moe"])
def test_fresh_adapter_is_exactly_the_base(name: str, zoo: Any) -> None:
    with zoo.hosted(name) as ours:
        ours.add_adapter("adapter a = lora(rank = 4) { on all linear }")
        for rows, length in zoo.shapes(name):
            batch = zoo.batch(name, rows, length)
            before = zoo.logits(ours, batch)
            with ours.disable_adapter():
                assert torch.equal(zoo.logits(ours, batch), before)


def test_apply_then_save(zoo: Any, tmp_path: Path) -> None:
    ours = compiler.apply(zoo.model("llama"), SPECS["llama-ranks"][1]).eval()
    zoo.randomise(ours)
    ours.save_pretrained(tmp_path)
    theirs = zoo.reference("llama", tmp_path)
    zoo.same(ours, theirs, "llama", base=zoo.model("llama"))
    zoo.randomise(ours, seed=5)
    with pytest.raises(AssertionError):
        zoo.same(ours, theirs, "llama")


def test_saved_again_by_peft(zoo: Any, tmp_path: Path) -> None:
    """ours -> peft -> ours keeps every tensor and the meaning of every field."""
    with zoo.hosted("llama") as ours:
        ours.add_adapter(SPECS["llama-ranks"][1])
        zoo.randomise(ours)
        ours.save_pretrained(tmp_path / "one")
        zoo.reference("llama", tmp_path / "one").save_pretrained(tmp_path / "two")
        ours.load_adapter(tmp_path / "two", "again")
        first, again = ours.adapter_state_dict("a"), ours.adapter_state_dict("again")
        assert first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first)
        batch = zoo.batch("llama")
        expected = zoo.logits(ours, batch)
        ours.set_adapter("again")
        assert torch.equal(zoo.logits(ours, batch), expected)


def test_selected_and_several(zoo: Any, tmp_path: Path) -> None:
    with zoo.hosted("llama") as ours:
        ours.add_adapter("adapter a = lora(rank = 4) { on q_proj }")
        zoo.randomise(ours, 1)
        ours.add_adapter(peft.LoraConfig(r=2, lora_alpha=5, target_modules=["k_proj", "up_proj"]), "b")
        zoo.randomise(ours, 2)
        ours.save_pretrained(tmp_path / "all")
        ours.save_pretrained(tmp_path / "one", selected_adapters=["b"])
        assert sorted(each.name for each in (tmp_path / "one").iterdir()) == ["README.md", "b"]
        theirs = zoo.reference("llama", tmp_path / "all" / "a", adapter_name="a")
        theirs.load_adapter(tmp_path / "all" / "b", "b")
        for name in ("a", "b"):
            ours.set_adapter(name)
            theirs.set_adapter(name)
            zoo.same(ours, theirs, "llama", base=zoo.model("llama"))
        ours.set_adapter(["a", "b"])
        theirs.base_model.set_adapter(["a", "b"])
        zoo.same(ours, theirs, "llama", base=zoo.model("llama"))
        only = zoo.reference("llama", tmp_path / "one" / "b")
        ours.set_adapter("b")
        zoo.same(ours, only, "llama")
