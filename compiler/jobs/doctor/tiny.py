"""Tiny models with random weights, made from configs: what the checks adapt."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn

from peftc.passes.foreign.transformers import LABELS, LOGITS, TOKENS, USE_CACHE, is_encoder_decoder, name_of
from peftc.passes.ir.roles import Role, Stack

VOCABULARY = 64
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


def decoder() -> Any:
    """A Llama of two layers; its linears are as wide as every quantization library accepts."""
    config = transformers.LlamaConfig(
        **{**_SIZES, "hidden_size": 64, "intermediate_size": 64},
        num_hidden_layers=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return _made(transformers.LlamaForCausalLM, config)


def encoder() -> Any:
    """A BERT of one layer that classifies."""
    config = transformers.BertConfig(**_SIZES, num_hidden_layers=1, max_position_embeddings=64)
    return _made(transformers.BertForSequenceClassification, config)


def encoder_decoder() -> Any:
    """A T5 of one layer each."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=None,
    )
    return _made(transformers.T5ForConditionalGeneration, config)


def ids(rows: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Tokens, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def scores(model: Any, text: torch.Tensor) -> torch.Tensor:
    """What a model gives for tokens."""
    given: torch.Tensor = model(**{TOKENS: text})[LOGITS]
    return given


def loss(model: Any, text: torch.Tensor) -> Any:
    """The loss of tokens that are to be foretold."""
    return model(**{TOKENS: text, LABELS: text}).loss


def scores_of_text(model: Any, text: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """Logits after each token but the last of a decoder, without a cache; `text` is what an encoder reads."""
    arguments: dict[str, Any] = {TOKENS: sequences[:, :-1], USE_CACHE: False}
    if is_encoder_decoder(model.config):
        arguments |= {TOKENS: text, name_of(Role.TOKENS, Stack.DECODER): sequences[:, :-1]}
    given: torch.Tensor = model(**arguments)[LOGITS]
    return given


@torch.no_grad()
def move(parameters: Iterable[nn.Parameter], amount: float = 0.1) -> int:
    """Put noise on what is trained: away from the start, at which an adapter does nothing. Returns how many tensors."""
    generator = torch.Generator().manual_seed(2)
    count = 0
    for parameter in parameters:
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * amount)
            count += 1
    return count


def _made(kind: Any, config: Any) -> Any:
    with seeded():
        return kind(config).eval()


@contextmanager
def seeded() -> Iterator[None]:
    """The same random numbers every time, and the caller's own afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
