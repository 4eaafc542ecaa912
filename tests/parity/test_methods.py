"""Every built-in method against peft: outputs both ways, and the initial state is the base exactly."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.library import builtin_methods

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
}
TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "dense"], "gpt2": ["c_attn", "c_proj"]}
EMBEDDINGS = {"llama": "embed_tokens", "bert": "word_embeddings", "gpt2": "wte"}

# method -> peft's configuration of it, our arguments for the same, and the models peft supports it on
METHODS: dict[str, tuple[Callable[..., peft.PeftConfig], str, tuple[str, ...]]] = {
    "lora": (lambda **k: peft.LoraConfig(r=4, lora_alpha=10, **k), "rank = 4, alpha = 10", ("llama", "bert", "gpt2")),
    "loha": (lambda **k: peft.LoHaConfig(r=4, alpha=10, **k), "rank = 4, alpha = 10", ("llama", "bert")),
    "hira": (lambda **k: peft.HiraConfig(r=4, **k), "rank = 4", ("llama", "bert", "gpt2")),
}
EMBEDDED = ("lora", "hira")  # the methods peft has for embeddings


def batch(rows: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 64, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def targets(method: str, model: str) -> list[str]:
    return TARGETS[model] + ([EMBEDDINGS[model]] if method in EMBEDDED else [])


def randomised(model: nn.Module, part: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if part in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def theirs(method: str, name: str, model: nn.Module) -> nn.Module:
    config = METHODS[method][0](target_modules=targets(method, name))
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    return randomised(wrapped, wrapped.base_model.prefix)


def ours(method: str, name: str, model: nn.Module) -> compiler.AdaptedModel:
    spec = f"adapter a = {method}({METHODS[method][1]}) {{ on {', '.join(targets(method, name))} }}"
    return compiler.apply(model, spec).eval()


@pytest.fixture(scope="module", params=MODELS)
def plain(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    return request.param, MODELS[request.param]().eval()


def test_every_method_is_here() -> None:
    assert set(METHODS) == set(builtin_methods())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_both_ways(method: str, plain: tuple[str, nn.Module], tmp_path: Path) -> None:
    name, model = plain
    if name not in METHODS[method][2]:
        with pytest.raises(TypeError, match="not supported"):  # so there is nothing to compare with
            theirs(method, name, model)
        return
    inputs = batch()
    with torch.no_grad():
        base = model(**inputs).logits
        wrapped = theirs(method, name, model)
        wrapped.save_pretrained(tmp_path / "theirs")
        loaded = compiler.load(model, tmp_path / "theirs")
        expected = wrapped(**inputs).logits
        assert_close(loaded(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
        assert (expected - base).abs().max() > 1e-3

        made = ours(method, name, model)
        assert torch.equal(made(**inputs).logits, base)
        randomised(made, "adapter_bank")
        made.save_pretrained(tmp_path / "ours")
        back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        unmerged = made(**inputs).logits
        assert_close(back(**inputs).logits, unmerged, rtol=1e-5, atol=1e-5)
        assert (unmerged - base).abs().max() > 1e-3

        made.merge_adapter()
        assert_close(made(**inputs).logits, unmerged, rtol=1e-5, atol=1e-5)
        made.unmerge_adapter()
        assert torch.equal(made(**inputs).logits, unmerged)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_pefts(method: str, plain: tuple[str, nn.Module], tmp_path: Path) -> None:
    name, model = plain
    if name not in METHODS[method][2]:
        return  # as test_both_ways shows
    inputs = batch()
    wrapped = theirs(method, name, model)
    wrapped.save_pretrained(tmp_path)
    loaded = compiler.load(model, tmp_path, is_trainable=True).eval()
    for each in (wrapped, loaded):
        each(**inputs).logits.square().sum().backward()
    mine = sorted(float(each.grad.norm()) for each in loaded.parameters() if each.requires_grad)
    its = sorted(float(each.grad.norm()) for each in wrapped.parameters() if each.requires_grad)
    assert_close(torch.tensor(mine), torch.tensor(its), rtol=1e-4, atol=1e-5)
    assert min(mine) > 0
