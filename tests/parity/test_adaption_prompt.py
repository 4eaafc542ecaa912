"""Adaption prompts against PEFT, both directions; and where PEFT does not go."""

import copy
import json
import math
import re
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import CheckpointError, ModelError, SpecError, UsageError
from tests.matrix import wide

MODELS = ("llama", "mistral", "gpt2")
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "beam": {"num_beams": 3}, "static": {"cache_implementation": "static"}}
SPEC = "adapter a = adaption_prompt(length = 3, layers = 1)"
SMALL = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)


def _theirs(zoo: Any, name: str, layers: int = 1) -> Any:
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=layers, task_type="CAUSAL_LM")
    return zoo.randomise(zoo.peft(name, config), seed=2, scale=1.0)


@pytest.mark.parametrize("name", wide(MODELS, ("llama", "gpt2")))
def test_both_directions(name: str, zoo: Any, tmp_path: Any) -> None:
    theirs = _theirs(zoo, name, 2 if name == "llama" else 1)
    theirs.save_pretrained(tmp_path / "theirs")
    with zoo.hosted(name) as ours:
        ours.load_adapter(tmp_path / "theirs", "a", is_trainable=True)
        ours.set_adapter("a")
        zoo.same(ours, theirs, name, zoo.model(name))
        batch = {**zoo.batch(name, 3, 6), "labels": zoo.labels(name, 3, 6)}
        losses = [each(**batch).loss for each in (theirs, ours)]
        assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
        for each in losses:
            each.backward()
        for key, mine in ours.named_parameters():
            if mine.grad is not None and mine.dim() == 3:
                layer = re.search(r"__(\d+)__", key)[1]
                (other,) = (
                    each for name, each in theirs.named_parameters() if f".{layer}." in name and "n_prompt" in name
                )
                assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)
                assert mine.grad.abs().max() > 1e-5
        ours.save_pretrained(tmp_path / "ours", selected_adapters=["a"])
        assert set(ours.adapter_state_dict("a")) == set(peft.get_peft_model_state_dict(theirs))
        written, given = (
            json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("ours", "theirs")
        )
        assert {key: given[key] for key in written if key != "base_model_name_or_path"} == {
            key: each for key, each in written.items() if key != "base_model_name_or_path"
        }
        zoo.same(zoo.reference(name, tmp_path / "ours"), ours, name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", wide(["llama", "gpt2"], ("llama",)))
def test_generate(name: str, way: str, zoo: Any, tmp_path: Any) -> None:
    theirs = _theirs(zoo, name)
    theirs.save_pretrained(tmp_path)
    batch = zoo.batch(name, 2, 5)  # padded on the left
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **WAYS[way]}
    with zoo.hosted(name) as ours:
        ours.load_adapter(tmp_path, "a")
        ours.set_adapter("a")
        assert torch.equal(ours.generate(**batch, **options), theirs.generate(**batch, **options))


def test_closed_gate_gives_the_base(zoo: Any) -> None:
    with zoo.hosted("llama") as ours:
        ours.add_adapter(SPEC)
        ours.set_adapter("a")
        batch = zoo.batch("llama")
        assert_close(ours(**batch).logits, zoo.model("llama")(**batch).logits, atol=0, rtol=0)


def _by_hand(model: Any, base: Any, batch: dict[str, torch.Tensor], bank: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model gives when its only layer looks at a prompt through the projections of `base`."""
    prompt, gate, own = bank["P"][0], bank["g"], base.model.layers[0].self_attn

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        x, size = kwargs["hidden_states"], module.head_dim
        cos, sin = (each[:, None] for each in kwargs["position_embeddings"])
        query, key, value = (
            each.unflatten(-1, (-1, size)).transpose(-2, -3)
            for each in (module.q_proj(x), own.k_proj(prompt), own.v_proj(prompt))
        )
        first, second = query.chunk(2, -1)
        query = query * cos + torch.cat([-second, first], -1) * sin
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[0], 0) for each in (key, value))
        seen = gate * (query @ key.mT / math.sqrt(size)).softmax(-1) @ value
        return output[0] + own.o_proj(seen.transpose(1, 2).flatten(2)), output[1]

    hook = model.model.layers[0].self_attn.register_forward_hook(look, with_kwargs=True)
    logits = model(**batch).logits
    hook.remove()
    return logits


def test_heads_that_are_not_the_hidden_size_and_lora_beside(zoo: Any) -> None:
    """Where PEFT cannot: grouped heads of their own size, and another adapter that the prompt does not go through."""
    torch.manual_seed(0)
    sizes = dict(num_key_value_heads=2, head_dim=8, attention_bias=True)
    model = zoo.randomise(hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **sizes, attn_implementation="eager"))).eval()
    adapted = compiler.apply(model, "adapter a = adaption_prompt(length = 3)").eval()
    zoo.randomise(adapted.get_submodule("adapter_bank"), scale=1.0)
    bank = {
        name.rpartition(".")[2]: each.detach()
        for name, each in adapted.get_submodule("adapter_bank").named_parameters()
    }
    batch = {"input_ids": torch.arange(14).reshape(2, 7)}
    got = adapted(**batch, output_attentions=True)
    assert got.attentions[0].shape[-1] == 7
    assert_close(got.logits, _by_hand(model, model, batch, bank), atol=1e-5, rtol=1e-5)
    assert (got.logits - model(**batch).logits).abs().max() > 1e-3

    adapted.add_adapter("adapter b = lora(rank = 2, alpha = 2) { on q_proj, k_proj, o_proj }")
    adapted.set_adapter(["a", "b"])
    zoo.randomise(adapted.get_submodule("adapter_bank.b"), scale=0.5)
    other = copy.deepcopy(model)
    for name in ("q_proj", "k_proj", "o_proj"):
        low = adapted.get_submodule(f"adapter_bank.b.model__layers__0__self_attn__{name}")
        other.get_submodule(f"model.layers.0.self_attn.{name}").weight.data += (low.B @ low.A).detach()
    wanted = _by_hand(other, model, batch, bank)
    assert_close(adapted(**batch).logits, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - _by_hand(other, other, batch, bank)).abs().max() > 1e-3


def test_low_precision_keeps_the_models_type(zoo: Any) -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)).to(torch.bfloat16)
    adapted = compiler.apply(model, "adapter a = adaption_prompt(length = 3)")
    kinds = {each.dtype for name, each in adapted.named_parameters() if name.startswith("adapter_bank")}
    assert kinds == {torch.bfloat16}


REFUSED = {
    "E235": "adapter a = adaption_prompt(layers = 3)",
    "E234": "adapter a = adaption_prompt { on mlp }",
}


@pytest.mark.parametrize("code", REFUSED)
def test_refused_specs(code: str, zoo: Any) -> None:
    with zoo.hosted("llama") as ours, pytest.raises(SpecError) as refused:
        ours.add_adapter(REFUSED[code])
    assert refused.value.diagnostics[0].code == code


def test_no_attention_of_this_kind(zoo: Any) -> None:
    with zoo.hosted("bert") as ours, pytest.raises(SpecError) as refused:
        ours.add_adapter(SPEC)
    assert refused.value.diagnostics[0].code == "E232"


def test_layers_by_name(zoo: Any, tmp_path: Any) -> None:
    with zoo.hosted("llama") as ours:
        ours.add_adapter("adapter a = adaption_prompt(length = 3) { on layers[-1].self_attn }")
        ours.add_adapter("adapter b = adaption_prompt(length = 3) { on layers[0].self_attn }")
        ours.set_adapter("a")
        ours.save_pretrained(tmp_path, selected_adapters=["a"])
        written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert (written["adapter_layers"], written["target_modules"]) == (1, "self_attn")
        with pytest.raises(CheckpointError) as refused:
            ours.save_pretrained(tmp_path, selected_adapters=["b"])
        assert refused.value.diagnostics[0].code == "E326"
        with pytest.raises(UsageError):
            ours.merge_adapter()


def test_an_attention_that_is_not_understood() -> None:
    model = Odd()
    adapted = compiler.apply(model, "adapter a = adaption_prompt(length = 3)")
    with pytest.raises(ModelError) as refused:
        adapted(torch.zeros(2, 5, 8))
    assert refused.value.diagnostics[0].code == "E422"


class Odd(nn.Module):
    """Attends without a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = OddAttention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x)


class OddAttention(nn.Module):
    """Linear attention, by names that others use too."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(x) @ (self.k_proj(x).mT @ self.v_proj(x)))
