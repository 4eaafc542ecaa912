"""Models with the same adapter of random values in peftc and in peft: what is done to one tree is done to the other."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from torch import nn

from peftc import compiler

IDS = torch.tensor([[5, 9, 11, 3, 8], [7, 7, 2, 1, 30]])
QV = ("q_proj", "v_proj")


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**(sizes | dict(num_key_value_heads=2, pad_token_id=0) | options))).eval()


def pair(base: nn.Module, targets: Sequence[str], place: Path, **options: Any) -> tuple[Any, Any]:
    """Ours and peft's, on the same base, with the same adapter; both can be trained."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        **(dict(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False) | options)
    )
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(place, save_embedding_layers=False)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), place, is_trainable=True).get_base_model()
    return compiler.load(base, place, is_trainable=True).eval(), theirs.eval()


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **options).logits


def first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]
