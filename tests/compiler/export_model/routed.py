"""Artifacts whose rows choose, of a tiny model: written, and held against the live model with one adapter active."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.compiler import Artifact

BASE = "__base__"
IDS = torch.tensor([[1, 5, 9, 4, 7]])


def llama() -> Any:
    """Random weights, the same each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def spec(*adapters: str) -> str:
    """A spec of these, called a, b and so on."""
    return " ".join(f"adapter {name} = {each}" for name, each in zip("abcdef", adapters, strict=False)) + " activate a"


def adapted(spec: str, model: Any = None, std: float = 0.5) -> Any:
    """The model with adapters of this spec, whose values are as if trained."""
    made = compiler.apply(llama() if model is None else model, spec).eval()
    torch.manual_seed(1)
    for each in made.adapter_bank.parameters():
        with torch.no_grad():
            each.add_(torch.randn_like(each) * std)
    return made


def export(made: Any, directory: Path, *names: str, **options: Any) -> Path:
    """Its plain forward with these adapters, routed."""
    made.set_adapter(names[0])
    made.export(directory, format="pt2", adapters="routed", entry="forward", adapter_names=names, **options)
    return directory


@torch.no_grad()
def alone(made: Any, name: str) -> torch.Tensor:
    """What the live model gives with one adapter active, or the base with none."""
    if name == BASE:
        with made.disable_adapter():
            return made(input_ids=IDS, use_cache=False).logits[0]
    made.set_adapter(name)
    return made(input_ids=IDS, use_cache=False).logits[0]


def check_rows(made: Any, directory: Path, names: Sequence[str]) -> None:
    """Rows of these names give what the live model gives with each of them alone, and that is not one and the same."""
    artifact = Artifact.load(directory)
    ids = IDS.expand(len(names), -1).contiguous()
    found = artifact("forward", given(artifact, ids, names))["logits"]
    for row, name in enumerate(names):
        assert_close(found[row], alone(made, name), rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for row, name in enumerate(names):
        for other in range(row):
            assert (found[row] - found[other]).abs().max() > 1e-3, (name, names[other])


def given(artifact: Artifact, ids: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The inputs of a call whose rows have adapters of these names."""
    known = artifact.manifest.adapter_names
    numbers = torch.tensor([-1 if name == BASE else known.index(name) for name in names])
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "adapter_ids": numbers}
    if artifact.manifest.entries["forward"].takes("position_ids"):
        made["position_ids"] = torch.arange(ids.shape[1]).expand(ids.shape).contiguous()
    return made


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {str(each.relative_to(directory)): each.read_bytes() for each in directory.rglob("*") if each.is_file()}


def draw(made: Any, name: str) -> None:
    """Other values for an adapter."""
    for each in getattr(made.adapter_bank, name).parameters():
        nn.init.normal_(each, std=0.5)
