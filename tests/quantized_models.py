"""Tiny transformers models, quantized by bitsandbytes, for the tests: made once, and to be left as they are."""

import copy
import functools
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig

from peftc import compiler
from tests import zoo

# Double quantization, and a compute type that is not the model's: all that a 4-bit linear can have.
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "exact": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}
SIZES = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(3))
SPEC = """
adapter a = lora(rank = 4) { on **.q_proj, **.v_proj }
adapter b = lora(rank = 4) { on **.q_proj, **.v_proj }
activate a
"""


@functools.cache
def dense(model: str, tied: bool = False) -> nn.Module:
    """A model of one layer in float32; biases are not zero."""
    torch.manual_seed(0)
    if model == "opt":
        opt = transformers.OPTConfig(
            hidden_size=64, ffn_dim=128, num_hidden_layers=1, num_attention_heads=2, dropout=0.0,
            max_position_embeddings=32, word_embed_proj_dim=64, **SIZES,
        )  # fmt: skip
        made: nn.Module = transformers.OPTForCausalLM(opt)
    else:
        llama = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            tie_word_embeddings=tied, **SIZES,
        )  # fmt: skip
        made = transformers.LlamaForCausalLM(llama)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return made.eval()


def quantize(model: nn.Module, kind: str, dtype: torch.dtype = torch.float32, *, repacks: bool = False) -> Any:
    """The model as transformers quantizes it; `repacks` if bitsandbytes' modules may do so when they are called."""
    settings = BitsAndBytesConfig(**KINDS[kind])
    made = type(model).from_pretrained(  # type: ignore[attr-defined]
        None, config=type(model.config)(**model.config.to_dict()), state_dict=model.state_dict(),
        quantization_config=settings, device_map={"": "cpu"}, dtype=dtype,
    )  # fmt: skip
    return made.eval() if repacks else plain_kernels(made)


def plain_kernels(model: Any) -> Any:
    """The model in evaluation mode, such that bitsandbytes computes from the weights as they were loaded."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@functools.cache
def pair(kind: str) -> tuple[Any, Any]:
    """A base, and LoRA `a` (active) and `b` on it, neither a no-op: 8-bit OPT, which has biases, or 4-bit Llama."""
    base = quantize(dense("opt" if kind == "int8" else "llama"), kind)
    return base, move(compiler.apply(base, SPEC)).eval()


def copy_with(kind: str, spec: str) -> Any:
    """A copy of the adapted model of a kind, with its traces, that has another adapter alone: not a no-op."""
    logits(pair(kind)[1])
    copied = copy.deepcopy(pair(kind)[1])
    copied.delete_adapter(["a", "b"])
    copied.add_adapter(spec)
    return move(copied).eval()


def move(adapted: Any) -> Any:
    """The same model with adapters that do something."""
    return zoo.noisy(adapted, seed=1, std=0.1)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """What a model answers in evaluation, without a trace for a cache."""
    return model(input_ids=ids, use_cache=False).logits.detach()


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all that a model stores, but for its adapters: by looking, since `state_dict` repacks."""
    found = {}
    for name, module in model.named_modules():
        if name.startswith("adapter_bank"):
            continue
        held = {**module._parameters, **module._buffers}
        if isinstance(module, bnb.nn.Linear4bit):
            state = vars(module.weight.quant_state)
            inner = vars(state["state2"]) if state.get("state2") is not None else {}
            held |= {f"state.{key}": value for key, value in state.items()}
            held |= {f"state2.{key}": value for key, value in inner.items()}
        if isinstance(module, bnb.nn.Linear8bitLt):
            held |= {f"weight.{key}": getattr(module.weight, key) for key in ("CB", "SCB")}
            held |= {f"state.{key}": getattr(module.state, key) for key in ("CB", "SCB")}
        for key, value in held.items():
            if isinstance(value, torch.Tensor):
                found[f"{name}.{key}"] = value.detach().as_subclass(torch.Tensor).clone()
    return found


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """The same names, and under each the same bits."""
    assert left.keys() == right.keys()
    pairs = ((name, each, right[name]) for name, each in left.items())
    assert not [name for name, one, other in pairs if one.dtype != other.dtype or not torch.equal(one, other)]
