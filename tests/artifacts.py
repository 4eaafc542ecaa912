"""Artifacts as the exporter writes them, of modules that are exported in a moment: what the runner is tested with."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim

from peftc.compiler.export_model.output import seal

VOCABULARY, WIDTH, HEADS, SIZE = 32, 8, 2, 4
DIMENSIONS: dict[str, Any] = {
    "batch": {"min": 1, "max": None},
    "sequence": {"min": 1, "max": 16},
    "past": {"min": 0, "max": 16},
}


def tensor(name: str, *shape: int | str, dtype: str = "float32") -> dict[str, Any]:
    """An input or output, as the manifest has it."""
    return {"name": name, "shape": list(shape), "dtype": dtype}


def write(directory: Path, programs: Mapping[str, Any], **artifact: Any) -> Path:
    """An artifact of programs by file name; `artifact` are fields of the manifest beside the usual ones."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        torch.export.save(program, directory / name)
    facts = {
        "format": 1,
        "backend": "pt2",
        "adapters": "merged",
        "dimensions": DIMENSIONS,
        "length": None,
        "generation": None,
        "machine": None,
        **artifact,
    }
    seal(directory, {"artifact": facts})
    return directory


class Forward(nn.Module):
    """A classifier of the sum of its tokens; with an adapter, of that sum moved by A and B."""

    def __init__(self, adapted: bool = False):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 3)
        self.adapted = adapted

    def forward(self, input_ids: Tensor, adapter: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        total = self.embed(input_ids).sum(1)
        if adapter is not None:
            total = total + total @ adapter["a.A"].T @ adapter["a.B"].T
        return {"logits": self.head(total)}


class Routed(nn.Module):
    """As `Forward`, of which each row has an adapter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Forward()
        self.bank = nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, input_ids: Tensor, adapter_ids: Tensor) -> dict[str, Tensor]:
        total = self.inner.embed(input_ids).sum(1) * self.bank[adapter_ids]
        return {"logits": self.inner.head(total)}


class Banked(nn.Module):
    """As `Routed`, with the bank as input: its first is the base's, which is row -1."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Forward()

    def forward(self, input_ids: Tensor, adapter_ids: Tensor, bank: dict[str, Tensor]) -> dict[str, Tensor]:
        total = self.inner.embed(input_ids).sum(1) * bank["a.s"][adapter_ids + 1]
        return {"logits": self.inner.head(total)}


class Speaker(nn.Module):
    """One layer of attention with a cache: a program for prefill and decode, as a model's is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        for each in self.parameters():
            nn.init.normal_(each)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_0_key: Tensor, past_0_value: Tensor
    ) -> dict[str, Tensor]:
        embedded = self.embed(input_ids) + self.positions(position_ids)
        query, key, value = (_heads(each(embedded)) for each in (self.query, self.key, self.value))
        keys, values = torch.cat([past_0_key, key], dim=2), torch.cat([past_0_value, value], dim=2)
        total = keys.shape[2]
        seen = torch.arange(total)[None, :] <= torch.arange(total)[-input_ids.shape[1] :, None]
        mask = seen[None, None] & (attention_mask[:, None, None, :] == 1)
        scores = (query @ keys.transpose(2, 3)).masked_fill(~mask, -1e9)
        mixed = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        return {"logits": self.head(embedded + mixed)[:, -1:], "present_0_key": keys, "present_0_value": values}


def _heads(value: Tensor) -> Tensor:
    return value.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)


CACHE = ("batch", HEADS, "past", SIZE)
GROWN = ("batch", HEADS, "past + sequence", SIZE)
TOKENS = tensor("input_ids", "batch", "sequence", dtype="int64")
LOGITS = tensor("logits", "batch", 3)
SPEAKING = {
    "file": "generate.pt2",
    "inputs": [
        TOKENS,
        tensor("attention_mask", "batch", "past + sequence", dtype="int64"),
        tensor("position_ids", "batch", "sequence", dtype="int64"),
        tensor("past_0_key", *CACHE),
        tensor("past_0_value", *CACHE),
    ],
    "outputs": [
        tensor("logits", "batch", 1, VOCABULARY),
        tensor("present_0_key", *GROWN),
        tensor("present_0_value", *GROWN),
    ],
    "state": {"present_0_key": "past_0_key", "present_0_value": "past_0_value"},
}
GENERATION = {
    "eos_token_id": [2],
    "pad_token_id": 0,
    "decoder_start_token_id": None,
    "encoder_decoder": False,
}


def exported(module: nn.Module, inputs: dict[str, Any], dynamic: dict[str, Any]) -> Any:
    """The module as a program with those axes free."""
    with torch.no_grad():
        return torch.export.export(module.eval(), (), inputs, dynamic_shapes=dynamic, strict=False)


def forward_program() -> Any:
    """Of `Forward`, without an adapter."""
    torch.manual_seed(0)
    ids = torch.ones(3, 5, dtype=torch.int64)
    return exported(Forward(), {"input_ids": ids}, {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}})


def adapter_program() -> Any:
    """Of `Forward`, with an adapter of rank 2 as input."""
    torch.manual_seed(0)
    adapter = {"a.B": torch.zeros(WIDTH, 2), "a.A": torch.zeros(2, WIDTH)}
    inputs = {"input_ids": torch.ones(3, 5, dtype=torch.int64), "adapter": adapter}
    free: dict[str, Any] = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}, "adapter": {"a.B": None, "a.A": None}}
    return exported(Forward(), inputs, free)


def routed_program() -> Any:
    """Of `Routed`."""
    torch.manual_seed(0)
    inputs = {"input_ids": torch.ones(3, 5, dtype=torch.int64), "adapter_ids": torch.tensor([0, 1, 0])}
    return exported(Routed(), inputs, {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}, "adapter_ids": {0: Dim.AUTO}})


def banked_program() -> Any:
    """Of `Banked`."""
    torch.manual_seed(0)
    inputs = {"input_ids": torch.ones(3, 5, dtype=torch.int64), "adapter_ids": torch.tensor([0, 1, 0])}
    free: dict[str, Any] = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}, "adapter_ids": {0: Dim.AUTO}}
    free["bank"] = {"a.s": {0: Dim.AUTO}}
    return exported(Banked(), {**inputs, "bank": {"a.s": torch.ones(4, WIDTH)}}, free)


def write_banked(directory: Path, rows: Mapping[str, Tensor], *, base: bool = True, **artifact: Any) -> Path:
    """An artifact of `Banked`, with a file for each row."""
    (directory / "adapters").mkdir(parents=True)
    for name, value in rows.items():
        save_file({"a.s": value}, directory / "adapters" / f"{name}.safetensors")
    taken = {"name": "a.s", "shape": ["adapters", WIDTH], "dtype": "float32", "slots": ["slots.p0__a"], "turned": False}
    inputs = [TOKENS, tensor("adapter_ids", "batch", dtype="int64"), {"name": "bank", "tensors": [taken]}]
    entry = {"file": "forward.pt2", "inputs": inputs, "outputs": [LOGITS], "state": {}}
    facts: dict[str, Any] = {
        "format": 2,
        "adapters": "routed",
        "adapter_names": [name for name in rows if name != "__base__"],
        "adapter_files": {name: f"adapters/{name}.safetensors" for name in rows},
        "bank": {"base": base, "constants": {}},
        "dimensions": {**DIMENSIONS, "adapters": {"min": 1, "max": None}},
        "entries": {"forward": entry},
    }
    return write_forward(directory, banked_program(), **{**facts, **artifact})


def speaking_program() -> tuple[nn.Module, Any]:
    """Of `Speaker`, and that module."""
    torch.manual_seed(0)
    module = Speaker()
    inputs = speaker_inputs(3, 5, 7)
    free = {name: {0: Dim.AUTO, (2 if name.startswith("past") else 1): Dim.AUTO} for name in inputs}
    return module, exported(module, inputs, free)


def speaker_inputs(batch: int, sequence: int, past: int) -> dict[str, Tensor]:
    """What `Speaker` takes, at a size."""
    generator = torch.Generator().manual_seed(batch * 100 + sequence * 10 + past)
    cache = (batch, HEADS, past, SIZE)
    return {
        "input_ids": torch.randint(3, VOCABULARY, (batch, sequence), generator=generator),
        "attention_mask": torch.ones(batch, past + sequence, dtype=torch.int64),
        "position_ids": torch.arange(past, past + sequence).expand(batch, -1).contiguous(),
        "past_0_key": torch.randn(cache, generator=generator),
        "past_0_value": torch.randn(cache, generator=generator),
    }


def write_forward(directory: Path, program: Any, **artifact: Any) -> Path:
    """An artifact with the entry `forward` alone."""
    entry = {"file": "forward.pt2", "inputs": [TOKENS], "outputs": [LOGITS], "state": {}}
    return write(directory, {"forward.pt2": program}, **{"entries": {"forward": entry}, **artifact})


def write_speaker(directory: Path, program: Any, **artifact: Any) -> Path:
    """An artifact that generates."""
    entries = {"prefill": SPEAKING, "decode": SPEAKING}
    usual = {"entries": entries, "generation": GENERATION, "length": 24}
    return write(directory, {"generate.pt2": program}, **{**usual, **artifact})


def said(speak: Callable[..., Any], ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    """What `Speaker` says greedily, without a cache and without ever ending."""
    for _ in range(steps):
        empty = torch.zeros(len(ids), HEADS, 0, SIZE)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        chosen = speak(ids, mask, positions, empty, empty)["logits"][:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, chosen], 1), torch.cat([mask, torch.ones_like(chosen)], 1)
    return ids
