"""Rows of one batch that have adapters of their own, on models of every kind: forward, and whatever generates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import UsageError

VOCABULARY = 96
NAMES = ["low", "__base__", "scaled", "dora", "low", "wide"]


def llama() -> nn.Module:
    sizes = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    tokens = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **tokens, num_key_value_heads=2))


def gpt2() -> nn.Module:
    sizes = dict(n_embd=48, n_layer=2, n_head=4, n_positions=64)
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, **sizes, pad_token_id=0, eos_token_id=2))


def bert() -> nn.Module:
    sizes = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=VOCABULARY, **sizes, num_labels=3))


def t5() -> nn.Module:
    sizes = dict(d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4)
    tokens = dict(vocab_size=VOCABULARY, decoder_start_token_id=0, eos_token_id=2)
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **tokens))


def whisper() -> nn.Module:
    sizes = dict(d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    more = dict(encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=20)
    tokens = dict(vocab_size=VOCABULARY, decoder_start_token_id=1, eos_token_id=2, pad_token_id=0, bos_token_id=1)
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes, **more, **tokens, max_target_positions=40))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (llama, ["q_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),
    "bert": (bert, ["query", "dense"]),
    "t5": (t5, ["q", "v", "wo"]),
    "whisper": (whisper, ["q_proj", "v_proj", "fc2"]),
}


def llava() -> nn.Module:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    text = hf.LlamaConfig(vocab_size=VOCABULARY, **sizes, num_key_value_heads=2, pad_token_id=0)
    vision = hf.CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=95))


@torch.no_grad()
def test_images_beside_a_text() -> None:
    """The tower's rows are images: both are of the first row here."""
    torch.manual_seed(0)
    model = compiler.apply(llava().eval(), "adapter tower = lora(rank = 2) { on q_proj }").eval()
    model.add_adapter("adapter text = lora(rank = 2) { on language_model.**.q_proj }")
    for each in model.adapter_bank.parameters():
        each.add_(torch.randn_like(each) * 0.3)
    ids = torch.randint(3, 90, (2, 12))
    ids[0, 1:9] = 95
    call = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8), "attention_mask": torch.ones_like(ids)}
    with pytest.raises(UsageError, match=r"E528.*vision_tower.*whose rows are images"):
        model(**call, adapter_names=["text", "tower"])
    with pytest.raises(UsageError, match="E528"):
        model.generate(**call, adapter_names=["text", "tower"], max_new_tokens=2)
    mixed = model(**call, adapter_names=["text", "__base__"]).logits
    model.set_adapter("text")
    assert_close(mixed[0], model(**call).logits[0], atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert_close(mixed[1], model(**call).logits[1], atol=1e-5, rtol=1e-5)


OPTIONS = ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"num_return_sequences": 2, "num_beams": 2})


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest) -> tuple[str, Any]:
    torch.manual_seed(0)
    factory, targets = MODELS[request.param]
    first, every = targets[0], ", ".join(targets)
    model = compiler.apply(factory().eval(), f"adapter low = lora(rank = 2, alpha = 8) {{ on {every} }}").eval()
    model.add_adapter(f"adapter wide = lora(rank = 7) {{ on {first} }}")
    model.add_adapter(f"adapter scaled = ia3 {{ on {every} }}")
    model.add_adapter(f"adapter dora = dora(rank = 3) {{ on {first} }}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter_bank" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.set_adapter("low")
    return request.param, model


def inputs_of(name: str, rows: int = len(NAMES)) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    if name == "whisper":
        return {"input_features": torch.randn(rows, 8, 40)}
    ids = torch.randint(3, VOCABULARY, (rows, 7))
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[3, :3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def alone(model: Any, name: str, function: Callable[[], Any]) -> Any:
    """What a function gives while one adapter, or none, is active."""
    if name == "__base__":
        with model.disable_adapter():
            return function()
    model.set_adapter(name)
    try:
        return function()
    finally:
        model.set_adapter("low")


def row_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    return {key: value[row : row + 1] for key, value in inputs.items()}


@pytest.mark.parametrize("made", MODELS, indirect=True)
@torch.no_grad()
def test_forward(made: tuple[str, Any]) -> None:
    name, model = made
    inputs = inputs_of(name)
    if name in ("t5", "whisper"):
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (len(NAMES), 5))
    mixed = model(**inputs, adapter_names=NAMES).logits
    for row, each in enumerate(NAMES):
        wanted = alone(model, each, lambda row=row: model(**row_of(inputs, row)).logits[0])
        aligned = wanted.dim() > 1 and "attention_mask" in inputs and "decoder_input_ids" not in inputs
        seen = inputs["attention_mask"][row].bool() if aligned else slice(None)
        assert_close(mixed[row][seen], wanted[seen], rtol=0, atol=1e-5 * float(wanted.abs().max().clamp(min=1)))
    assert model.active_adapters() == ["low"]


@pytest.mark.parametrize("made", [name for name in MODELS if name != "bert"], indirect=True)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_generate(made: tuple[str, Any], options: dict[str, Any]) -> None:
    name, model = made
    inputs, more = inputs_of(name), dict(max_new_tokens=5, min_new_tokens=5, **options)
    mixed = model.generate(**inputs, adapter_names=NAMES, **more)
    times = options.get("num_return_sequences", 1)
    for row, each in enumerate(NAMES):
        wanted = alone(model, each, lambda row=row: model.generate(**row_of(inputs, row), **more))
        assert torch.equal(mixed[row * times : (row + 1) * times], wanted), each
