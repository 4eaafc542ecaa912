"""Prefixes of models that keep no cache: BERT and RoBERTa against PEFT, others against attention written by hand."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn
from torch.testing import assert_close
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftc import compiler
from peftc.grammar.diagnostics import ModelError

LENGTH = 4
SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
TEXT = dict(vocab_size=64, max_position_embeddings=32, pad_token_id=0, **SIZES)
T5 = dict(vocab_size=64, d_model=16, d_kv=8, num_heads=4, num_layers=2, d_ff=32, num_decoder_layers=5)
MODELS: dict[str, Callable[..., Any]] = {
    "distilbert": lambda **given: hf.DistilBertModel(
        hf.DistilBertConfig(
            vocab_size=64, dim=16, n_layers=1, n_heads=4, hidden_dim=32, max_position_embeddings=32, **given
        )
    ),
    "modernbert": lambda **given: hf.ModernBertModel(hf.ModernBertConfig(**TEXT, **given)),
    "t5": lambda **given: hf.T5EncoderModel(hf.T5Config(**T5, **given)),
    "vit": lambda **given: hf.ViTModel(hf.ViTConfig(**SIZES, image_size=8, patch_size=4, **given)),
    "eurobert": lambda **given: hf.EuroBertModel(hf.EuroBertConfig(**TEXT, num_key_value_heads=2, **given)),
}
IMPLEMENTED = [("vit", "sdpa"), ("vit", "eager"), ("distilbert", "sdpa")]
OTHERS = [("modernbert", "sdpa"), ("t5", "eager"), ("eurobert", "eager")]


def _batch(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    ids = torch.randint(5, 60, (2, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@contextlib.contextmanager
def _by_hand(model: Any, prefix: torch.Tensor) -> Iterator[None]:
    """Let the model attend to a prefix `[length, slots, heads, size]` too, and count its text from there."""
    slots, count = prefix.permute(1, 2, 0, 3), iter(range(0, prefix.shape[1], 2))

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **rest: Any) -> Any:
        slot, rows = next(count), query.shape[0]
        key, value = (
            torch.cat([slots[slot + i].expand(rows, -1, -1, -1), each], 2) for i, each in enumerate((key, value))
        )
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
        scores = query @ key.mT * rest["scaling"]
        bias = rest.get("position_bias")
        if bias is not None:
            scores = scores + nn.functional.pad(bias, (LENGTH, 0))
        if mask is not None:
            scores = scores + nn.functional.pad(mask, (LENGTH, 0))
        weights = scores.softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    hooks = [
        module.register_forward_pre_hook(lambda _, args: (args[0] + LENGTH, *args[1:]))
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and path.endswith("position_embeddings")
    ]
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    own = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register("by_hand", attend)
    hf.AttentionMaskInterface.register("by_hand", hf.masking_utils.eager_mask)
    model.set_attn_implementation("by_hand")
    try:
        yield
    finally:
        model.set_attn_implementation(own)
        for each in hooks:
            each.remove()
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def _adapted(model: Any) -> tuple[Any, torch.Tensor]:
    adapted = compiler.apply(model, f"adapter a = prefix(length = {LENGTH})").eval()
    (own,) = (each for name, each in adapted.named_parameters() if name.startswith("adapter_bank"))
    return adapted, own


@pytest.mark.parametrize(
    ("name", "implementation"), [*IMPLEMENTED, *(pytest.param(*each, marks=pytest.mark.matrix) for each in OTHERS)]
)
def test_by_hand(name: str, implementation: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name](attn_implementation=implementation).eval()
    adapted, own = _adapted(model)
    batch = _batch(name)
    got = adapted(**batch).last_hidden_state
    config = model.config
    heads, layers = getattr(config, "num_key_value_heads", None) or config.num_attention_heads, config.num_hidden_layers
    with _by_hand(model, own.detach().reshape(LENGTH, 2 * layers, heads, -1)):
        wanted = model(**batch).last_hidden_state
    assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert (got - model(**batch).last_hidden_state).abs().max() > 1e-3
    (grad,) = torch.autograd.grad(got.square().sum(), own)
    assert (grad.abs().sum(1) > 0).all()


def test_disentangled(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeBERTa: softmax over two sets of keys is each one's, weighed by what their exponents sum to."""
    torch.manual_seed(0)
    relative = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False)
    model = hf.DebertaV2Model(hf.DebertaV2Config(**TEXT, **relative)).eval()
    adapted, own = _adapted(model)
    batch, seen, softmax = _batch("deberta"), [], nn.functional.softmax
    got = adapted(**batch).last_hidden_state

    def watch(scores: torch.Tensor, dim: int) -> torch.Tensor:
        seen.append(scores)
        return softmax(scores, dim)

    def merge(module: Any, args: Any, output: Any) -> Any:
        hidden, heads = args[0], lambda each: each.unflatten(-1, (4, 4)).transpose(1, 2)
        keys, values = own.reshape(LENGTH, 2, 4, 4).permute(1, 2, 0, 3)
        scores = heads(module.query_proj(hidden)) @ keys.mT / math.sqrt(4 * 3)
        sums = torch.stack([seen.pop().logsumexp(-1), scores.logsumexp(-1)]).softmax(0)[..., None]
        both = sums[0] * heads(output[0]) + sums[1] * (scores.softmax(-1) @ values)
        return both.transpose(1, 2).flatten(2), *output[1:]

    monkeypatch.setattr(nn.functional, "softmax", watch)
    hook = model.encoder.layer[0].attention.self.register_forward_hook(merge)
    wanted = model(**batch).last_hidden_state
    hook.remove()
    keep = batch["attention_mask"].bool()  # one that sees nothing weighs everything alike
    assert_close(got[keep], wanted[keep], atol=1e-5, rtol=1e-5)
    assert (got - model(**batch).last_hidden_state)[keep].abs().max() > 1e-3


@pytest.mark.parametrize(("name", "task"), [("bert", "SEQ_CLS"), ("roberta", "TOKEN_CLS")])
def test_against_peft(name: str, task: str, zoo: Any, tmp_path: Any) -> None:
    theirs = zoo.peft(name, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=LENGTH))
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
        (grad,) = (each.grad for key, each in ours.named_parameters() if key.endswith(".P"))
        assert_close(grad, theirs.prompt_encoder.default.embedding.weight.grad, atol=1e-5, rtol=1e-4)
        ours.save_pretrained(tmp_path / "ours", selected_adapters=["a"])
        zoo.same(zoo.reference(name, tmp_path / "ours"), ours, name)


def test_positions_run_out(zoo: Any) -> None:
    with zoo.hosted("roberta") as ours:
        ours.add_adapter("adapter a = prefix(length = 120)")
        ours.set_adapter("a")
        ours(**zoo.batch("roberta", 2, 6))  # positions begin after the padding's
        with pytest.raises(ModelError) as refused:
            ours(**zoo.batch("roberta", 2, 7))
        assert refused.value.diagnostics[0].code == "E423"
