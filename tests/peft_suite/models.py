"""Stand-ins for the models that PEFT's tests take from the Hub: tiny ones of the same kinds, in a cache like its."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

COMMIT = "0" * 39 + "1"
WORDS = 1024
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}


def _opt(**fields: Any) -> hf.PretrainedConfig:
    own = {"ffn_dim": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 5, "dtype": "float32"}
    return hf.OPTConfig(**{**SIZES, **own, **fields})


def _gpt(kind: type[hf.PretrainedConfig]) -> hf.PretrainedConfig:
    own = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return kind(vocab_size=WORDS, **{name: each for name, each in own.items() if _takes(kind, name)}, **ids)


def _takes(kind: type[hf.PretrainedConfig], name: str) -> bool:
    return name != "rotary_dim" or kind is hf.GPTJConfig


def _t5() -> hf.PretrainedConfig:
    own = {"d_model": 16, "d_ff": 32, "d_kv": 4, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return hf.T5Config(vocab_size=WORDS, **own)


def _bart() -> hf.PretrainedConfig:
    own = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in _LAYERS.items()}
    return hf.BartConfig(vocab_size=WORDS, d_model=16, max_position_embeddings=128, **own)


def _whisper() -> hf.PretrainedConfig:
    own = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in _LAYERS.items()}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return hf.WhisperConfig(vocab_size=WORDS, d_model=16, num_mel_bins=8, max_source_positions=30, **own, **ids)


_LAYERS = {"layers": 2, "attention_heads": 4, "ffn_dim": 32}
BASES: dict[str, tuple[type[Any], Callable[[], hf.PretrainedConfig]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (hf.OPTForCausalLM, _opt),
    "peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab": (
        hf.OPTForCausalLM,
        lambda: _opt(vocab_size=WORDS + 16),
    ),
    "peft-internal-testing/opt-125m": (hf.OPTForCausalLM, lambda: _opt(num_hidden_layers=12)),
    "facebook/opt-125m": (hf.OPTForCausalLM, lambda: _opt(num_hidden_layers=12)),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (hf.GPT2LMHeadModel, lambda: _gpt(hf.GPT2Config)),
    "peft-internal-testing/tiny-random-gpt2": (hf.GPT2LMHeadModel, lambda: _gpt(hf.GPT2Config)),
    "hf-internal-testing/tiny-random-gpt2": (hf.GPT2LMHeadModel, lambda: _gpt(hf.GPT2Config)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (hf.GPTJForCausalLM, lambda: _gpt(hf.GPTJConfig)),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**GROUPED)),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (hf.MistralForCausalLM, lambda: hf.MistralConfig(**GROUPED)),
    "peft-internal-testing/tiny-dummy-qwen2": (hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**GROUPED)),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": (
        hf.Qwen3ForCausalLM,
        lambda: hf.Qwen3Config(**GROUPED, head_dim=4),
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        hf.Gemma3ForCausalLM,
        lambda: hf.Gemma3TextConfig(**GROUPED, head_dim=4),
    ),
    "peft-internal-testing/tiny-random-BertModel": (hf.BertModel, lambda: hf.BertConfig(**SIZES)),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        hf.RobertaForSequenceClassification,
        lambda: hf.RobertaConfig(**SIZES),
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (hf.BartForConditionalGeneration, _bart),
    "peft-internal-testing/tiny-clip-text-2": (hf.CLIPTextModelWithProjection, lambda: hf.CLIPTextConfig(**SIZES)),
    "peft-internal-testing/tiny-random-t5": (hf.T5ForConditionalGeneration, _t5),
    "peft-internal-testing/tiny-random-whisper": (hf.WhisperForConditionalGeneration, _whisper),
}
_OPT = "peft-internal-testing/tiny-random-OPTForCausalLM"
ADAPTERS: dict[str, tuple[type[Any], str, str | None, list[str]]] = {
    "tiny-OPTForCausalLM-lora": (hf.OPTForCausalLM, _OPT, "CAUSAL_LM", ["q_proj", "v_proj"]),
    "tiny-opt-lora-revision": (hf.OPTForCausalLM, _OPT, "CAUSAL_LM", ["q_proj", "v_proj"]),
    "tiny_OPTForSequenceClassification-lora": (
        hf.OPTForSequenceClassification,
        _OPT,
        "SEQ_CLS",
        ["q_proj", "v_proj"],
    ),
    "tiny_OPTForQuestionAnswering-lora": (hf.OPTForQuestionAnswering, _OPT, "QUESTION_ANS", ["q_proj", "v_proj"]),
    "tiny_OPTForFeatureExtraction-lora": (hf.OPTModel, _OPT, "FEATURE_EXTRACTION", ["q_proj", "v_proj"]),
    "tiny_GPT2ForTokenClassification-lora": (
        hf.GPT2ForTokenClassification,
        "peft-internal-testing/tiny-random-gpt2",
        "TOKEN_CLS",
        ["c_attn"],
    ),
    "tiny_T5ForSeq2SeqLM-lora": (
        hf.T5ForConditionalGeneration,
        "peft-internal-testing/tiny-random-t5",
        "SEQ_2_SEQ_LM",
        ["q", "v"],
    ),
    "tiny_WhisperForConditionalGeneration-lora": (
        hf.WhisperForConditionalGeneration,
        "peft-internal-testing/tiny-random-whisper",
        None,
        ["q_proj", "v_proj"],
    ),
}


def make(home: Path) -> None:
    """Fill the cache below `home`, which is to be HF_HOME, unless it is there."""
    made = {name: home / "hub" / f"models--{name.replace('/', '--')}" for name in BASES}
    for name, (kind, config) in BASES.items():
        if not made[name].exists():
            torch.manual_seed(0)
            model = kind(config())
            _tokenizer().save_pretrained(_snapshot(made[name]))
            model.save_pretrained(_snapshot(made[name]))
    for name, (kind, base, task, targets) in ADAPTERS.items():
        place = home / "hub" / f"models--peft-internal-testing--{name}"
        if not place.exists():
            torch.manual_seed(0)
            model = kind.from_pretrained(_snapshot(made[base]))
            config = peft.LoraConfig(task_type=task, target_modules=targets, base_model_name_or_path=base)
            if task is None:
                config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
            adapted = peft.get_peft_model(model, config)
            adapted.peft_config["default"].base_model_name_or_path = base
            adapted.save_pretrained(_snapshot(place))


def _snapshot(place: Path) -> Path:
    snapshot = place / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (place / "refs").mkdir(exist_ok=True)
    for name in ("main", "test"):
        (place / "refs" / name).write_text(COMMIT)
    return snapshot


def _tokenizer() -> hf.PreTrainedTokenizerFast:
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    words = special | {f"word{number}": number for number in range(len(special), WORDS)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
