"""Prefixes against PEFT, both directions; and where PEFT does not go."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.testing import assert_close
from transformers.cache_utils import DynamicCache

from peftc import compiler
from peftc.compiler.api import adapt
from tests.matrix import wide
from tests.parity.cases.fronts import (
    CARTRIDGE,
    GENERATE,
    NEAR,
    PREFIX,
    PROJECTION,
    both_ways,
    own,
    recomputes,
    switches_without_compiling,
    tokens,
    unpadded,
)

METHODS = {"prefix": PREFIX, "projection": PROJECTION, "cartridge": CARTRIDGE}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "t5-3": "SEQ_2_SEQ_LM"}
SMALL = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
T5 = dict(vocab_size=128, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=3, dropout_rate=0.0)
A, B = "adapter a = prefix(length = 4)", "adapter b = prefix(length = 4)"


@pytest.fixture(scope="module")
def odd() -> tuple[Any, Any]:
    """A T5 of three layers, whose decoder reads every place of the prefix, in another order than it has them."""
    torch.manual_seed(0)
    base = hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0, eos_token_id=None)).eval()
    return base, adapt(base).eval()


@pytest.fixture(autouse=True)
def untouched(zoo: Any) -> Iterator[None]:
    """Whatever a test does, the user's models stay as they are."""
    before = [zoo.snapshot(zoo.model(name)) for name in ("llama", "gpt2", "t5")]
    yield
    for each in before:
        each.check()


@pytest.fixture
def llama(zoo: Any) -> Iterator[Any]:
    """A Llama with two prefixes, the first one active."""
    with zoo.hosted("llama") as ours:
        for seed, spec in enumerate((A, B)):
            ours.add_adapter(spec)
            ours.set_adapter(spec.split()[1])
            zoo.randomise(ours, seed, scale=0.7)
        ours.set_adapter("a")
        yield ours


def _labelled(zoo: Any, name: str) -> dict[str, torch.Tensor]:
    batch = {**zoo.batch(name[:2] if name == "t5-3" else name, 3, 6), "labels": zoo.labels(name[:2], 3, 6)}
    batch.pop("decoder_input_ids", None)
    return batch | ({"labels": batch["labels"][:, :4]} if name.startswith("t5") else {})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", wide(TASKS, ("llama", "t5")))
def test_both_directions(name: str, method: str, zoo: Any, odd: Any, tmp_path: Path) -> None:
    batch = _labelled(zoo, name)
    if name == "t5-3":
        both_ways(METHODS[method], *odd, TASKS[name], batch, tmp_path)
        odd[1].delete_adapter(["live", "read", "again"])
        return
    with zoo.hosted(name) as ours:
        both_ways(METHODS[method], zoo.model(name), ours, TASKS[name], batch, tmp_path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", wide(["llama", "gpt2", "t5"], ("llama", "t5")))
def test_generate(name: str, method: str, zoo: Any, tmp_path: Path) -> None:
    """PEFT's tokens, of rows padded on the left too; from a static cache they are the same, which PEFT cannot."""
    base = zoo.model(name)
    theirs = METHODS[method].theirs(base, TASKS[name])
    theirs.save_pretrained(tmp_path)
    prompt = zoo.batch(name, 3, 7)
    prompt.pop("decoder_input_ids", None)
    with zoo.hosted(name) as ours:
        ours.load_adapter(tmp_path, "a")
        ours.set_adapter("a")
        for options in ({}, {"num_beams": 3}):
            got = tokens(ours, prompt, **options)
            assert torch.equal(got, tokens(theirs, prompt, **options))
            assert not torch.equal(got, tokens(base, prompt, **options))
            assert torch.equal(got, tokens(ours, prompt, cache_implementation="static", **options))
            assert torch.equal(got[[1, 1]], tokens(ours, unpadded(prompt, 1), **options))


def test_a_conversation(llama: Any, zoo: Any) -> None:
    """The cache that a user holds counts real tokens only, and the second turn goes on from it."""
    prompt = zoo.batch("llama", 3, 7)
    first = llama.generate(**prompt, **GENERATE, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 12
    ids = torch.cat([first.sequences, torch.full((3, 2), 9)], 1)
    more = {"input_ids": ids, "attention_mask": torch.cat([prompt["attention_mask"], torch.ones(3, 8).long()], 1)}
    wanted = tokens(llama, more)
    assert torch.equal(tokens(llama, more, past_key_values=first.past_key_values), wanted)
    assert not torch.equal(wanted, tokens(zoo.model("llama"), more))


def _with_prefix(model: Any, prefix: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a plain model says when transformers' own cache holds keys and values `[length, out]` already."""
    rows, config = len(batch["input_ids"]), model.config
    sizes = (2 * config.num_hidden_layers, config.num_key_value_heads, -1)
    slots = prefix.detach().unflatten(1, sizes).permute(1, 2, 0, 3)[:, None].expand(-1, rows, -1, -1, -1)
    cache = DynamicCache(list(zip(slots[::2], slots[1::2], strict=True)))
    mask = torch.nn.functional.pad(batch["attention_mask"], (len(prefix), 0), value=1)
    with torch.no_grad():
        logits: torch.Tensor = model(batch["input_ids"], attention_mask=mask, past_key_values=cache).logits
    return logits


def test_beside_lora_and_another_prefix(llama: Any, zoo: Any) -> None:
    """Adapters active together are each one's change of the model, made at once."""
    batch, base = _labelled(zoo, "llama"), zoo.model("llama")
    llama.add_adapter("adapter l = lora(rank = 2, alpha = 6) { on all linear }")
    llama.set_adapter("l")
    zoo.randomise(llama, 3, scale=0.1)
    bank = {key: each for key, each in llama.named_parameters() if key.startswith("adapter_bank.l.")}
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for key, low in bank.items():
            place, role = key.removeprefix("adapter_bank.l.").rsplit(".", 1)
            if role == "A":
                tuned.get_submodule(place.replace("__", ".")).weight.add_(3 * bank[key[:-1] + "B"] @ low)
    prefixes = [own(llama, name)["P"] for name in "ab"]
    cases = {("a",): (base, prefixes[:1]), ("l", "a"): (tuned, prefixes[:1]), ("a", "b"): (base, prefixes)}
    cases[("b", "l", "a")] = (tuned, prefixes[::-1])
    seen: list[torch.Tensor] = []
    for active, (model, parts) in cases.items():
        llama.set_adapter(list(active))
        seen.append(zoo.logits(llama, batch))
        wanted = _with_prefix(model, torch.cat(list(parts)), batch)[batch["attention_mask"].bool()]
        assert_close(seen[-1], wanted, **NEAR)
    assert all((one - other).abs().max() > 1e-3 for i, one in enumerate(seen) for other in seen[:i])
    with llama.disable_adapter(), torch.no_grad():
        labels = batch.pop("labels")
        assert torch.equal(llama(**batch, labels=labels).logits, base(**batch).logits)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_gradient_checkpointing(name: str, zoo: Any) -> None:
    """Same losses and gradients, and less is kept."""
    batch = _labelled(zoo, name)
    with zoo.hosted(name) as ours:
        ours.add_adapter(PROJECTION.spec("a"))
        ours.set_adapter("a")
        zoo.randomise(ours, scale=0.7)
        recomputes(ours, batch)


def test_switching_compiles_nothing_anew(llama: Any, zoo: Any) -> None:
    other = {**zoo.batch("llama", 4, 11), "labels": zoo.labels("llama", 4, 11)}
    switches_without_compiling(llama, zoo, _labelled(zoo, "llama"), other)


def test_trainer(zoo: Any, tmp_path: Path) -> None:
    theirs = PREFIX.theirs(zoo.model("llama"), "CAUSAL_LM")
    theirs.save_pretrained(tmp_path / "start")
    columns = {**zoo.batch("llama", 9, 6), "labels": zoo.labels("llama", 9, 6)}
    rows = [{key: each[row] for key, each in columns.items()} for row in range(9)]
    losses = []
    with zoo.hosted("llama") as ours:
        ours.load_adapter(tmp_path / "start", "a", is_trainable=True)
        ours.set_adapter("a")
        for model in (ours, theirs):
            arguments = hf.TrainingArguments(
                str(tmp_path),
                max_steps=3,
                per_device_train_batch_size=3,
                learning_rate=0.3,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                seed=11,
            )
            trainer = hf.Trainer(model, arguments, train_dataset=rows)
            trainer.train()
            losses.append(torch.tensor([each["loss"] for each in trainer.state.log_history if "loss" in each]))
        assert_close(losses[0], losses[1], atol=2e-4, rtol=0)
        assert losses[0].unique().numel() == len(losses[0]) == 3
        moved = own(ours, "a")["P"]
        assert_close(moved, theirs.prompt_encoder["default"].embedding.weight, atol=1e-4, rtol=1e-4)


def test_low_precision(tmp_path: Path) -> None:
    """A prefix stays in float32 beside a model in bfloat16, in its file too; also embedded, and with no cache."""
    torch.manual_seed(0)
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)).bfloat16().eval()
    ids = torch.randint(3, 64, (2, 5))
    theirs = PREFIX.theirs(base, "CAUSAL_LM")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = compiler.load(base, tmp_path / "theirs", adapter_name="a").eval()
    with torch.no_grad():
        got = ours(ids).logits
        assert got.dtype == torch.bfloat16
        assert_close(got, theirs(ids).logits)
        assert (got - base(ids).logits).abs().max() > 1e-2
        ours.save_pretrained(tmp_path / "ours")
        ours.load_adapter(tmp_path / "ours", "b", is_trainable=True)
        ours.set_adapter("b")
        assert torch.equal(ours(ids).logits, got)
        assert torch.equal(ours(inputs_embeds=base.get_input_embeddings()(ids)).logits, got)
        ours.float()
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(tokens(ours, prompt, use_cache=False), tokens(ours, prompt))
    assert own(ours, "b")["P"].dtype == torch.float32
    assert torch.equal(own(ours, "b")["P"], theirs.prompt_encoder["default"].embedding.weight)
