"""Models to do things to: what there is in each to hook, replace and change, and adapters to put on it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

SEED = 7


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and its places. The first value of an attribute, and of what stands in a place, is the model's own."""

    name: str
    make: Callable[[], nn.Module]
    calls: tuple[Callable[[torch.dtype], dict[str, Any]], ...]
    files: Mapping[str, Mapping[str, Any]]  # adapters as peft writes them
    specs: Mapping[str, tuple[str, float]]  # adapters as texts, and their scales
    layers: tuple[str, ...]
    parts: tuple[str, ...]  # modules inside and around layers
    attributes: tuple[tuple[str, str, tuple[Any, ...]], ...] = ()
    configs: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    swaps: tuple[tuple[str, tuple[Callable[[], nn.Module], ...]], ...] = ()
    biases: tuple[str, ...] = ()  # modules without a bias
    bypassed: tuple[str, ...] = ()  # modules inside of layers that give what they are given, in another form
    generates: bool = False


def text(rows: int, length: int, **more: Any) -> Callable[[torch.dtype], dict[str, Any]]:
    """A call with tokens and labels."""
    generator = torch.Generator().manual_seed(rows * 10 + length)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    return lambda dtype: {"input_ids": ids, "labels": ids, **more}


def padded(rows: int, length: int) -> Callable[[torch.dtype], dict[str, Any]]:
    """The same with a mask."""
    call = text(rows, length)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :2] = 0
    return lambda dtype: {**call(dtype), "attention_mask": mask}


def linear(inputs: int, outputs: int, bias: bool = False) -> Callable[[], nn.Module]:
    """A linear of random weights."""

    def made() -> nn.Module:
        torch.manual_seed(SEED)
        return nn.Linear(inputs, outputs, bias=bias)

    return made


def normed(size: int) -> Callable[[], nn.Module]:
    """A norm of random weights."""

    def made() -> nn.Module:
        torch.manual_seed(SEED)
        norm = nn.LayerNorm(size)
        nn.init.normal_(norm.weight, 1.0, 0.3)
        return norm

    return made


def _llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0)).eval()


QV = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}
LLAMA = Subject(
    "llama",
    _llama,
    (text(2, 5), text(2, 6), padded(3, 6)),
    {
        "a": QV,
        "b": QV,
        "c": {"target_modules": ["q_proj", "down_proj"], "r": 2, "lora_alpha": 4, "lora_dropout": 0.3},
        "d": {"target_modules": ["v_proj"], "r": 2, "lora_alpha": 2, "modules_to_save": ["lm_head"]},
    },
    {"e": ('lora(rank = 4, alpha = 8, init = "random") { on q_proj, v_proj }', 2.0)},
    ("model.layers.0", "model.layers.1"),
    (
        "model.layers.0.self_attn",
        "model.layers.0.mlp",
        "model.layers.1.input_layernorm",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
        "model.embed_tokens",
        "model.norm",
        "model",
        "lm_head",
    ),
    attributes=(
        ("model.layers.0.self_attn", "scaling", (0.35355339, 0.1)),
        ("model.layers.1.input_layernorm", "variance_epsilon", (1e-6, 0.5)),
        ("model.layers.1.self_attn", "attention_dropout", (0.0, 0.4)),
        ("model.norm", "variance_epsilon", (1e-6, 0.5)),
        ("model.rotary_emb", "attention_scaling", (1.0, 1.3)),
        ("model.layers.0", "note", (None, 3)),
    ),
    configs=(
        ("output_hidden_states", (False, True)),
        ("use_cache", (True, False)),
        ("_attn_implementation", ("sdpa", "eager")),
    ),
    swaps=(
        ("model.layers.0.post_attention_layernorm", (nn.Identity, normed(32))),
        ("model.layers.1.mlp.act_fn", (nn.Tanh, nn.GELU)),
        ("model.layers.0.self_attn.o_proj", (linear(32, 32),)),
        ("model.layers.1.mlp.up_proj", (linear(32, 48, bias=True),)),
    ),
    biases=("model.layers.1.mlp.gate_proj", "model.layers.0.self_attn.q_proj"),
    bypassed=("model.layers.0.mlp.act_fn", "model.layers.1.post_attention_layernorm"),
    generates=True,
)


def _bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return hf.BertForTokenClassification(hf.BertConfig(**sizes, max_position_embeddings=32, num_labels=64)).eval()


BERT = Subject(
    "bert",
    _bert,
    (text(2, 5), padded(3, 6)),
    {
        "a": {"target_modules": ["query", "value"], "r": 4, "lora_alpha": 8},
        "b": {"target_modules": ["query", "value"], "r": 4, "lora_alpha": 8},
        "c": {"target_modules": ["key", "intermediate.dense"], "r": 2, "lora_alpha": 4, "lora_dropout": 0.3},
        "d": {"target_modules": ["query"], "r": 2, "lora_alpha": 2, "modules_to_save": ["classifier"]},
    },
    {"e": ('lora(rank = 4, alpha = 8, init = "random") { on query, value }', 2.0)},
    ("bert.encoder.layer.0", "bert.encoder.layer.1"),
    (
        "bert.encoder.layer.0.attention",
        "bert.encoder.layer.0.attention.self",
        "bert.encoder.layer.1.intermediate",
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.1.output.LayerNorm",
        "bert.encoder.layer.0.attention.self.dropout",
        "bert.embeddings.word_embeddings",
        "bert.encoder",
        "bert",
        "dropout",
        "classifier",
    ),
    attributes=(
        ("bert.encoder.layer.0.attention.output.LayerNorm", "eps", (1e-12, 0.5)),
        ("bert.encoder.layer.1.output.dropout", "p", (0.1, 0.6)),
        ("bert.encoder.layer.0.attention.self", "scaling", (0.35355339, 0.1)),
        ("bert.embeddings.LayerNorm", "eps", (1e-12, 0.5)),
    ),
    configs=(("output_hidden_states", (False, True)), ("_attn_implementation", ("sdpa", "eager"))),
    swaps=(
        ("bert.encoder.layer.1.output.LayerNorm", (nn.Identity, normed(32))),
        ("bert.encoder.layer.0.intermediate.intermediate_act_fn", (nn.Tanh,)),
        ("bert.encoder.layer.1.output.dropout", (nn.Identity,)),
        ("bert.encoder.layer.1.attention.output.dense", (linear(32, 32, bias=True),)),
    ),
    bypassed=("bert.encoder.layer.0.output.LayerNorm", "bert.encoder.layer.1.attention.output.dropout"),
)


class Block(nn.Module):
    """A residual block with a dropout, a norm, an activation and things to change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.drop, self.act = nn.Dropout(0.2), nn.ReLU()
        self.gain, self.flip, self.sizes = 1.0, False, [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc2(self.drop(self.act(self.fc1(self.norm(x))))) * self.gain
        return x - y if self.flip else x + y / len(self.sizes)


class Net(nn.Module):
    """A convolution with running statistics, blocks, a table and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8)
        self.table = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 4)
        self.raw = torch.ones(8)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn(self.conv(x))).mean((2, 3)) + self.table(index)
        for each in self.blocks:
            y = each(y)
        return self.head(y * self.raw)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def _image(rows: int) -> Callable[[torch.dtype], dict[str, Any]]:
    x = torch.randn(rows, 2, 5, 5, generator=torch.Generator().manual_seed(rows))
    return lambda dtype: {"x": x.to(dtype), "index": torch.arange(rows) % 10}


NET = Subject(
    "net",
    _net,
    (_image(3), _image(5)),
    {
        "a": {"target_modules": ["fc1", "conv"], "r": 4, "lora_alpha": 8},
        "b": {"target_modules": ["fc1", "conv"], "r": 4, "lora_alpha": 8},
        "c": {"target_modules": ["fc2", "table"], "r": 2, "lora_alpha": 4, "lora_dropout": 0.3},
        "d": {"target_modules": ["fc2"], "r": 2, "lora_alpha": 2, "modules_to_save": ["head"]},
    },
    {"e": ('lora(rank = 4, alpha = 8, init = "random") { on fc1, fc2 }', 2.0)},
    ("blocks.0", "blocks.1", "blocks.2"),
    (
        "blocks.0.norm",
        "blocks.1.fc1",
        "blocks.2.fc2",
        "blocks.0.drop",
        "blocks.1.act",
        "conv",
        "bn",
        "table",
        "head",
    ),
    attributes=(
        ("blocks.0", "gain", (1.0, 2.0)),
        ("blocks.1", "flip", (False, True)),
        ("blocks.2", "sizes", ([1, 2], [1])),
        ("blocks.0.norm", "eps", (1e-5, 0.5)),
        ("blocks.1.drop", "p", (0.2, 0.7)),
        ("bn", "momentum", (0.1, 0.5)),
        ("", "raw", (torch.ones(8), torch.arange(8.0))),
    ),
    swaps=(
        ("blocks.0.act", (nn.Tanh, nn.GELU)),
        ("blocks.1.drop", (nn.Identity,)),
        ("blocks.2.norm", (nn.Identity, normed(8))),
        ("bn", (nn.Identity,)),
        ("blocks.1.fc2", (linear(12, 8),)),
    ),
    biases=("blocks.0.fc2",),
    bypassed=("blocks.0.norm", "blocks.1.act"),
)
SUBJECTS = {each.name: each for each in (LLAMA, BERT, NET)}
