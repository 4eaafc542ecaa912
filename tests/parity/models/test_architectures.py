"""Many architectures, one small model each: a checkpoint of peft's gives peft's outputs, tokens and gradients here."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as T
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from tests.matrix import wide

# One layer shows how an architecture computes; there are two where the second is of another kind.
MIXED = {"num_hidden_layers": 2}
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**SIZES, **TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 128}
ENCODER = {**SIZES, "pad_token_id": 0, "max_position_embeddings": 128}
SEQ2SEQ = {
    "vocab_size": 128,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    **TOKENS,
}

ALWAYS = ("opt", "falcon")
MAKE: dict[str, Callable[[], nn.Module]] = {
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**DECODER, sliding_window=6)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**DECODER)),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**DECODER, head_dim=16)),
    "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**{**DECODER, **MIXED}, head_dim=16, sliding_window=6)),
    "phi3": lambda: T.Phi3ForCausalLM(T.Phi3Config(**DECODER)),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**DECODER, num_local_experts=4)),
    "gpt_oss": lambda: T.GptOssForCausalLM(
        T.GptOssConfig(
            **{**DECODER, **MIXED}, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=6
        )
    ),
    "gpt_neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**SIZES, **TOKENS, max_position_embeddings=128)),
    "opt": lambda: T.OPTForCausalLM(
        T.OPTConfig(
            vocab_size=128,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=64,
            **TOKENS,
        )
    ),
    "bloom": lambda: T.BloomForCausalLM(T.BloomConfig(vocab_size=128, hidden_size=64, n_layer=1, n_head=4, **TOKENS)),
    "falcon": lambda: T.FalconForCausalLM(
        T.FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, **TOKENS)
    ),
    "cohere": lambda: T.CohereForCausalLM(T.CohereConfig(**DECODER)),
    "olmo2": lambda: T.Olmo2ForCausalLM(T.Olmo2Config(**DECODER)),
    "stablelm": lambda: T.StableLmForCausalLM(T.StableLmConfig(**DECODER)),
    "granite": lambda: T.GraniteForCausalLM(T.GraniteConfig(**DECODER)),
    "smollm3": lambda: T.SmolLM3ForCausalLM(T.SmolLM3Config(**DECODER)),
    "starcoder2": lambda: T.Starcoder2ForCausalLM(T.Starcoder2Config(**DECODER)),
    "distilbert": lambda: T.DistilBertForSequenceClassification(
        T.DistilBertConfig(vocab_size=128, dim=64, hidden_dim=96, n_layers=1, n_heads=4, max_position_embeddings=128)
    ),
    "deberta_v2": lambda: T.DebertaV2ForSequenceClassification(
        T.DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16)
    ),
    "modernbert": lambda: T.ModernBertForMaskedLM(
        T.ModernBertConfig(**{**ENCODER, **MIXED}, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
    ),
    "electra": lambda: T.ElectraForTokenClassification(T.ElectraConfig(**ENCODER, embedding_size=64)),
    "clip_text": lambda: T.CLIPTextModel(T.CLIPTextConfig(**ENCODER, bos_token_id=1, eos_token_id=2)),
    "bart": lambda: T.BartForConditionalGeneration(
        T.BartConfig(**SEQ2SEQ, max_position_embeddings=128, decoder_start_token_id=2, forced_eos_token_id=None)
    ),
    "whisper": lambda: T.WhisperForConditionalGeneration(
        T.WhisperConfig(
            **SEQ2SEQ,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=64,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    ),
}


def inputs(name: str, rows: int, length: int) -> dict[str, torch.Tensor]:
    if name == "whisper":
        return {
            "input_features": torch.randn(rows, 8, 40),
            "decoder_input_ids": torch.randint(5, 128, (rows, length)),
        }
    ids = torch.randint(5, 128, (rows, length))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, :2] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    return {**batch, "decoder_input_ids": ids[:, 1:]} if name == "bart" else batch


def outcome(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**batch)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


@pytest.mark.parametrize("name", wide(MAKE, ALWAYS))
def test_architecture(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MAKE[name]().eval()
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = compiler.load(model, tmp_path, is_trainable=True).eval()
    for rows, length in ((2, 7), (1, 9), (3, 12)):
        batch = inputs(name, rows, length)
        mine = outcome(ours, batch)
        assert_close(mine, outcome(theirs, batch), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(mine, outcome(model, batch), rtol=1e-3, atol=1e-3)
    mine.float().sum().backward()
    assert all(each.grad is not None for each in ours.parameters() if each.requires_grad)
    if getattr(model, "can_generate", bool)():
        start = {key: value for key, value in inputs(name, 2, 5).items() if not key.startswith("decoder")}
        options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
        assert torch.equal(ours.generate(**start, **options), theirs.generate(**start, **options))
