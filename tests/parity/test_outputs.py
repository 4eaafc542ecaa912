"""Every way to call a model, and everything it returns, is the plain model's."""

import copy
from typing import Any

import peft
import pytest
import torch
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.utils import ModelOutput

from peftc import compiler
from tests.matrix import wide

CALLS: dict[str, dict[str, Any]] = {
    "hidden": dict(output_hidden_states=True),
    "tuple": dict(return_dict=False),
    "last-logits": dict(logits_to_keep=2),
}


def _leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, EncoderDecoderCache):
        return _leaves(value.self_attention_cache) + _leaves(value.cross_attention_cache)
    if isinstance(value, Cache):
        return [each for layer in value.layers for each in (layer.keys, layer.values)]
    if isinstance(value, ModelOutput):
        return [leaf for each in value.values() for leaf in _leaves(each)]
    return [leaf for each in value for leaf in _leaves(each)] if isinstance(value, tuple | list) else []


def _same(got: Any, wanted: Any) -> None:
    assert type(got) is type(wanted)
    if isinstance(wanted, ModelOutput):
        assert list(got) == list(wanted)
    if isinstance(wanted, tuple):
        assert len(got) == len(wanted)
    mine, theirs = _leaves(got), _leaves(wanted)
    assert len(mine) == len(theirs) > 0
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def pair(zoo: Any) -> Any:
    """For each model: the adapted one, and PEFT's with the same adapter."""
    made: dict[str, tuple[Any, Any]] = {}

    def get(name: str, tmp: Any) -> tuple[Any, Any]:
        if name not in made:
            theirs = zoo.peft(name, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
            theirs.save_pretrained(tmp)
            zoo.host(name).load_adapter(tmp, "outputs")
            made[name] = (zoo.host(name), theirs)
        return made[name]

    yield get
    for ours, _ in made.values():
        ours.delete_adapter("outputs")


def _check(ours: Any, theirs: Any, batch: dict[str, Any]) -> None:
    """As PEFT with the adapter, as the plain model without, and these two differ."""
    with torch.no_grad():
        got, wanted = ours(**batch), theirs(**batch)
        _same(got, wanted)
        with ours.disable_adapter(), theirs.disable_adapter():
            plain = ours(**batch)
            _same(plain, theirs(**batch))
    with pytest.raises(AssertionError):
        _same(got, plain)


@pytest.mark.parametrize("call", CALLS)
def test_options(call: str, pair: Any, zoo: Any, tmp_path: Any) -> None:
    _check(*pair("llama", tmp_path), {**zoo.batch("llama", 1, 6), **CALLS[call]})


@pytest.mark.parametrize("name", wide(["bert", "vit", "t5", "roberta"], ("bert", "vit")))
def test_hidden_states_and_labels(name: str, pair: Any, zoo: Any, tmp_path: Any) -> None:
    batch = {**zoo.batch(name, 1, 6), "labels": zoo.labels(name, 1, 6), "output_hidden_states": True}
    batch.pop("decoder_input_ids", None)
    _check(*pair(name, tmp_path), batch)


def test_labels_with_ignored_tokens(pair: Any, zoo: Any, tmp_path: Any) -> None:
    ours, theirs = pair("llama", tmp_path)
    labels = zoo.labels("llama", 2, 6)
    labels[0, :3] = -100
    batch = {**zoo.batch("llama", 2, 6), "labels": labels}
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).loss, theirs(**batch).loss, atol=1e-5, rtol=1e-5)
        for count in (torch.tensor(9), torch.tensor(4)):
            got = ours(**batch, num_items_in_batch=count).loss
            torch.testing.assert_close(got, theirs(**batch, num_items_in_batch=count).loss, atol=1e-5, rtol=1e-5)
        assert (got - ours(**batch).loss).abs() > 1e-3


@pytest.mark.parametrize("name", wide(["llama", "gpt2"], ("llama",)))
def test_embeddings_and_positions(name: str, pair: Any, zoo: Any, tmp_path: Any) -> None:
    ours, theirs = pair(name, tmp_path)
    ids = zoo.batch(name, 2, 6)["input_ids"]
    embedded = zoo.model(name).get_input_embeddings()(ids).detach()
    _check(ours, theirs, {"inputs_embeds": embedded, "position_ids": torch.arange(3, 9).expand(2, 6)})


def test_positional_arguments(pair: Any, zoo: Any, tmp_path: Any) -> None:
    ours, theirs = pair("llama", tmp_path)
    batch = zoo.batch("llama", 1, 6)
    with torch.no_grad():
        _same(ours(batch["input_ids"], batch["attention_mask"]), theirs(batch["input_ids"], batch["attention_mask"]))
    with pytest.raises(TypeError, match="multiple values"):
        ours(batch["input_ids"], input_ids=batch["input_ids"])
    for each in (ours, theirs):  # what the model says to what it cannot use
        with pytest.raises(AttributeError, match="ndim"):
            each(input_ids=batch["input_ids"], attention_mask=object())


def test_four_dimensional_mask(pair: Any, zoo: Any, tmp_path: Any) -> None:
    ours, theirs = pair("llama", tmp_path)
    ids = zoo.batch("llama", 1, 6)["input_ids"]
    seen = torch.ones(6, 6, dtype=torch.bool).tril().expand(1, 1, 6, 6).clone()
    seen[..., 4:, 1] = False
    _check(ours, theirs, {"input_ids": ids, "attention_mask": seen})


def test_attentions(zoo: Any, tmp_path: Any) -> None:
    model = copy.deepcopy(zoo.model("llama"))
    model.set_attn_implementation("eager")
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules="all-linear")).eval()
    zoo.randomise(theirs).save_pretrained(tmp_path)
    ours = compiler.load(model, tmp_path)
    _check(ours, theirs, {**zoo.batch("llama", 1, 6), "output_attentions": True})


def test_no_mask_and_sizes_never_traced_with(pair: Any, zoo: Any, tmp_path: Any) -> None:
    ours, theirs = pair("llama", tmp_path)
    for rows, length in ((1, 1), (1, 2), (7, 1), (2, 60)):
        ids = torch.randint(5, 128, (rows, length), generator=torch.Generator().manual_seed(length))
        _check(ours, theirs, {"input_ids": ids})


def test_config_changes_are_followed(zoo: Any, pair: Any, tmp_path: Any) -> None:
    ours, _ = pair("llama", tmp_path)
    batch = zoo.batch("llama", 1, 4)
    ours.config.output_hidden_states = True
    try:
        with torch.no_grad():
            assert len(ours(**batch).hidden_states) == 3
    finally:
        ours.config.output_hidden_states = False
    assert zoo.model("llama").config.output_hidden_states is False


def test_gradients_are_pefts(pair: Any, zoo: Any, tmp_path: Any) -> None:
    theirs = zoo.peft("llama", peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj", "down_proj", "lm_head"]))
    theirs.save_pretrained(tmp_path)
    with zoo.hosted("llama") as ours:
        ours.load_adapter(tmp_path, "grad", is_trainable=True)
        ours.set_adapter("grad")
        batch = {**zoo.batch("llama", 2, 6), "labels": zoo.labels("llama", 2, 6)}
        for model in (ours, theirs):
            model.train()
            model(**batch).loss.backward()
            model.eval()
        got = {name: each.grad for name, each in ours.named_parameters() if each.grad is not None}
        wanted = {name: each.grad for name, each in theirs.named_parameters() if each.grad is not None}
        assert len(got) == len(wanted) == 12
        by_norm = [sorted(float(each.norm()) for each in grads.values()) for grads in (got, wanted)]
        assert by_norm[0] == pytest.approx(by_norm[1], abs=1e-5)
        assert min(by_norm[0]) > 1e-4


def test_autocast(pair: Any, zoo: Any, tmp_path: Any) -> None:
    ours, theirs = pair("llama", tmp_path)
    batch = zoo.batch("llama", 1, 6)
    plain = zoo.logits(ours, batch)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = zoo.logits(ours, batch), zoo.logits(theirs, batch)
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.05)
    assert (got - plain).abs().max() > 1e-5
