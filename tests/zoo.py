"""The zoo of tiny models: every architecture the tests use, in one set of sizes, with the same weights at every call.

`make("llama")` is a model of its own each time, in evaluation mode, so a test may do with it what it likes. Fields of
the config may be given; those left out are the zoo's, so that most tests have models of one structure, which
`tests.shared_traces` traces once in a process.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCABULARY = 64
SPECIAL = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
WIDTHS = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
TEXT = dict(vocab_size=VOCABULARY, **WIDTHS)
DECODER = dict(**TEXT, **SPECIAL, num_key_value_heads=2, max_position_embeddings=64)
EXPERTS = dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
T5 = dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)

# The class, its config's, and the fields of the latter.
MODELS: dict[str, tuple[Callable[[Any], Any], Callable[..., Any], dict[str, Any]]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, DECODER),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, dict(**DECODER, sliding_window=6)),
    "moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, dict(**DECODER, **EXPERTS)),
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        dict(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=64, **SPECIAL),
    ),
    "bert": (hf.BertForSequenceClassification, hf.BertConfig, dict(**TEXT, max_position_embeddings=64)),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        dict(**T5, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2),
    ),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig, dict(**WIDTHS, image_size=16, patch_size=4)),
}


def make(name: str, seed: int = 0, **fields: Any) -> Any:
    """A model of the zoo with these fields in its config, its weights those of the seed."""
    kind, config, own = MODELS[name]
    torch.manual_seed(seed)
    return kind(config(**{**own, **fields})).eval()


def noisy(adapted: Any, seed: int = 3, std: float = 0.2) -> Any:
    """The same model, its adapters away from where they start: they do something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for each in adapted.adapter_bank.parameters():
            each.add_(torch.randn_like(each) * std)
    return adapted
