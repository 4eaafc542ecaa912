"""Prompts of virtual tokens against PEFT, both directions; and where PEFT does not go."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch.testing import assert_close

from peftc import compiler
from peftc.compiler.api import adapt
from tests.matrix import wide
from tests.parity.cases.fronts import (
    GENERATE,
    LENGTH,
    MULTITASK,
    NEAR,
    PROMPT,
    PTUNING,
    both_ways,
    own,
    recomputes,
    switches_without_compiling,
    tokens,
    unpadded,
)

METHODS = {"prompt": PROMPT, "ptuning": PTUNING, "multitask": MULTITASK}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}
CASES = [
    *((name, method, 1) for name in TASKS for method in METHODS if (name, method) != ("t5", "multitask")),
    ("t5", "prompt", 2),
    ("t5", "ptuning", 2),
]
SMALL = dict(
    vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
HEADS: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "TOKEN_CLS": ("bert", "classifier", lambda: hf.BertForTokenClassification(hf.BertConfig(**SMALL, **NO_DROPOUT))),
    "QUESTION_ANS": ("bert", "qa_outputs", lambda: hf.BertForQuestionAnswering(hf.BertConfig(**SMALL, **NO_DROPOUT))),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=128,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        )
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=128, hidden_size=16, n_layer=1, n_head=2)),
}
A, B = "adapter a = prompt(length = 4)", "adapter b = prompt(length = 4)"


@pytest.fixture(autouse=True)
def untouched(zoo: Any) -> Iterator[None]:
    """Whatever a test does, the user's models stay as they are."""
    before = [zoo.snapshot(zoo.model(name)) for name in TASKS]
    yield
    for each in before:
        each.check()


@pytest.fixture
def gpt2(zoo: Any) -> Iterator[Any]:
    """A GPT-2 with two prompts, the first one active."""
    with zoo.hosted("gpt2") as ours:
        for seed, spec in enumerate((A, B)):
            ours.add_adapter(spec)
            ours.set_adapter(spec.split()[1])
            zoo.randomise(ours, seed, scale=0.7)
        ours.set_adapter("a")
        yield ours


def _labelled(zoo: Any, name: str, method: str = "") -> dict[str, torch.Tensor]:
    """Rows padded on the right, where PEFT's positions are what they should be."""
    batch = {**zoo.batch(name, 3, 6), "labels": zoo.labels(name, 3, 6)}
    batch.pop("decoder_input_ids", None)
    batch |= {key: batch[key].flip(1) for key in ("input_ids", "attention_mask")}
    return batch | ({"task_ids": torch.tensor([2, 0, 2])} if method == "multitask" else {})


@pytest.mark.parametrize(("name", "method", "submodules"), CASES)
def test_both_directions(name: str, method: str, submodules: int, zoo: Any, tmp_path: Path) -> None:
    fields: dict[str, Any] = {} if method == "multitask" else {"num_transformer_submodules": submodules}
    rest = "submodules = 2" if submodules == 2 else "{ train classifier }" if name == "bert" else ""
    batch = _labelled(zoo, name, method)
    with zoo.hosted(name) as ours:
        both_ways(METHODS[method], zoo.model(name), ours, TASKS[name], batch, tmp_path, rest, **fields)


@pytest.mark.parametrize("task", HEADS)
def test_other_heads(task: str, zoo: Any, tmp_path: Path) -> None:
    """Labels and places count the text's own tokens, as without an adapter; PEFT wants virtual tokens counted in."""
    name, head, make = HEADS[task]
    torch.manual_seed(0)
    base = make().eval()
    batch = zoo.batch(name, 3, 6)
    if task == "TOKEN_CLS":
        batch["labels"] = torch.randint(0, 2, (3, 6))
    else:
        batch |= {"start_positions": torch.tensor([1, 3, 0]), "end_positions": torch.tensor([4, 5, 2])}
    both_ways(PROMPT, base, adapt(base).eval(), task, batch, tmp_path, f"{{ train {head} }}")


@pytest.mark.parametrize(
    ("name", "method"), wide([each[:2] for each in CASES if each[0] != "bert" and each[2] == 1], ("llama",))
)
def test_generate(name: str, method: str, zoo: Any, tmp_path: Path) -> None:
    """PEFT's tokens where it counts as we do or we as it; padding on the left changes nothing, which PEFT cannot."""
    base = zoo.model(name)
    theirs = METHODS[method].theirs(base, TASKS[name])
    theirs.save_pretrained(tmp_path)
    prompt = zoo.batch(name, 3, 7)
    prompt.pop("decoder_input_ids", None)
    extra = {"task_ids": torch.tensor([2, 0, 2])} if method == "multitask" else {}
    with zoo.hosted(name) as ours:
        ours.load_adapter(tmp_path, "a")
        ours.load_adapter(tmp_path, "as_peft", values={"peft_compatible": True})
        for options in ({}, {"num_beams": 3}):
            wanted = tokens(theirs, prompt | extra, **options)
            ours.set_adapter("as_peft")
            assert torch.equal(tokens(ours, prompt | extra, **options), wanted)
            ours.set_adapter("a")
            got = tokens(ours, prompt | extra, **options)
            assert not torch.equal(got, tokens(base, prompt, **options))
            alone = unpadded(prompt | extra, 1)
            assert torch.equal(got[[1, 1]], tokens(ours, alone, **options))
            assert torch.equal(got[[1, 1]], tokens(theirs, alone, **options))
            assert torch.equal(got, tokens(ours, prompt | extra, cache_implementation="static", **options))


@pytest.mark.parametrize("name", wide(["llama", "gpt2", "t5"], ("gpt2",)))
def test_as_peft(name: str, zoo: Any) -> None:
    """Its lengths and its positions, padding on the left and all; it is our default that padding does not move."""
    theirs = PROMPT.theirs(zoo.model(name), TASKS[name], num_transformer_submodules=1)
    batch = {**zoo.batch(name, 3, 6), "labels": zoo.labels(name, 3, 6)}
    batch.pop("decoder_input_ids", None)
    with zoo.hosted(name) as ours, torch.no_grad():
        wanted = theirs(**batch)
        found = []
        for adapter, arguments in (("as_peft", ", peft_compatible = true"), ("ours", "")):
            ours.add_adapter(PROMPT.spec(adapter, arguments))
            PROMPT.follow(ours, adapter, theirs)
            ours.set_adapter(adapter)
            found.append(ours(**batch))
        assert_close(found[0].logits, wanted.logits, **NEAR)
        assert_close(found[0].loss, wanted.loss, **NEAR)
        first = unpadded(batch, 1)
        first["labels"] = first["labels"] if name == "t5" else first["labels"][:, -first["input_ids"].shape[1] :]
        length, alone = first["labels"].shape[1], ours(**first).logits[0]
        assert_close(found[1].logits[1, -length:], alone, **NEAR)
        assert (wanted.logits[1, -length:] - alone).abs().max() > 1e-4


@pytest.mark.parametrize("name", wide(OTHERS, ("opt",)))
def test_padding_on_the_left(name: str, zoo: Any) -> None:
    torch.manual_seed(0)
    base = zoo.randomise(OTHERS[name]().eval())
    ours = compiler.apply(base, A).eval()
    zoo.randomise(ours, scale=0.7)
    batch = zoo.batch("llama", 3, 6)
    with torch.no_grad():
        together, alone = ours(**batch).logits, ours(**unpadded(batch)).logits[0]
        assert_close(together[0, -len(alone) :], alone, **NEAR)
        assert (alone - base(**unpadded(batch)).logits[0]).abs().max() > 1e-3


def test_a_checkpoint_of_an_lstm(zoo: Any, tmp_path: Path) -> None:
    """PEFT saves what its encoder computes, whatever the encoder."""
    fields = {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2}
    theirs = PTUNING.theirs(zoo.model("llama"), "CAUSAL_LM", **fields)
    theirs.save_pretrained(tmp_path / "theirs")
    batch = _labelled(zoo, "llama")
    with zoo.hosted("llama") as ours, torch.no_grad():
        ours.load_adapter(tmp_path / "theirs", "a")
        ours.set_adapter("a")
        wanted, got = theirs(**batch), ours(**batch)
        assert_close(got.logits, wanted.logits[:, LENGTH:], **NEAR)
        assert_close(got.loss, wanted.loss, **NEAR)
        assert (got.logits - zoo.model("llama")(**batch).logits).abs().max() > 1e-3
        ours.save_pretrained(tmp_path / "ours", selected_adapters=["a"])
        assert_close(zoo.reference("llama", tmp_path / "ours")(**batch).logits, wanted.logits, **NEAR)


def test_a_conversation(gpt2: Any, zoo: Any) -> None:
    """The cache that a user holds counts real tokens only, and the second turn goes on from it."""
    prompt = zoo.batch("gpt2", 3, 7)
    first = gpt2.generate(**prompt, **GENERATE, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 12
    ids = torch.cat([first.sequences, torch.full((3, 2), 9)], 1)
    more = {"input_ids": ids, "attention_mask": torch.cat([prompt["attention_mask"], torch.ones(3, 8).long()], 1)}
    wanted = tokens(gpt2, more)
    assert torch.equal(tokens(gpt2, more, past_key_values=first.past_key_values), wanted)
    assert not torch.equal(wanted, tokens(zoo.model("gpt2"), more))


def test_beside_lora_and_another_prompt(gpt2: Any, zoo: Any) -> None:
    """Adapters active together are each one's change of the model, made at once."""
    batch, base = _labelled(zoo, "gpt2"), zoo.model("gpt2")
    labels = batch.pop("labels")
    gpt2.add_adapter("adapter l = lora(rank = 2, alpha = 6) { on c_attn, c_proj }")
    gpt2.set_adapter("l")
    zoo.randomise(gpt2, 3, scale=0.1)
    bank = {key: each for key, each in gpt2.named_parameters() if key.startswith("adapter_bank.l.")}
    tuned = copy.deepcopy(base)
    prompts = [own(gpt2, name)["P"] for name in "ab"]
    with torch.no_grad():
        for key, low in bank.items():
            place, role = key.removeprefix("adapter_bank.l.").rsplit(".", 1)
            if role == "A":
                tuned.get_submodule(place.replace("__", ".")).weight.add_((3 * bank[key[:-1] + "B"] @ low).T)
    cases = {("a",): (base, prompts[:1]), ("l", "a"): (tuned, prompts[:1]), ("a", "b"): (base, prompts)}
    seen: list[torch.Tensor] = []
    for active, (model, parts) in cases.items():
        gpt2.set_adapter(list(active))
        length = LENGTH * len(parts)
        with torch.no_grad():
            prompt = torch.cat(list(parts)).expand(3, -1, -1)
            embedded = torch.cat([prompt, model.get_input_embeddings()(batch["input_ids"])], 1)
            mask = torch.nn.functional.pad(batch["attention_mask"], (length, 0), value=1)
            ignored = torch.nn.functional.pad(labels, (length, 0), value=-100)
            wanted = model(inputs_embeds=embedded, attention_mask=mask, labels=ignored)
            got = gpt2(**batch, labels=labels)
        assert_close(got.logits, wanted.logits[:, length:], **NEAR)
        assert_close(got.loss, wanted.loss, **NEAR)
        seen.append(got.logits)
    assert all((one - other).abs().max() > 1e-3 for i, one in enumerate(seen) for other in seen[:i])
    with gpt2.disable_adapter(), torch.no_grad():
        assert torch.equal(gpt2(**batch, labels=labels).logits, base(**batch).logits)


@pytest.mark.parametrize("method", ["prompt", "ptuning"])
def test_gradient_checkpointing(method: str, zoo: Any) -> None:
    """Same losses and gradients, and less is kept."""
    batch = _labelled(zoo, "gpt2")
    with zoo.hosted("gpt2") as ours:
        ours.add_adapter(METHODS[method].spec("a"))
        ours.set_adapter("a")
        zoo.randomise(ours, scale=0.7)
        recomputes(ours, batch)


def test_switching_compiles_nothing_anew(gpt2: Any, zoo: Any) -> None:
    other = {**zoo.batch("gpt2", 4, 11), "labels": zoo.labels("gpt2", 4, 11)}
    switches_without_compiling(gpt2, zoo, _labelled(zoo, "gpt2"), other)


def test_low_precision(tmp_path: Path) -> None:
    """A prompt stays in float32 beside a model in bfloat16, in its file too; also embedded, and with no cache."""
    torch.manual_seed(0)
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)).bfloat16().eval()
    ids = torch.randint(3, 64, (2, 5))
    theirs = PROMPT.theirs(base, "CAUSAL_LM")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = compiler.load(base, tmp_path / "theirs", adapter_name="a").eval()
    with torch.no_grad():
        got = ours(ids).logits
        assert got.dtype == torch.bfloat16
        assert_close(got, theirs(ids).logits[:, LENGTH:])
        assert (got - base(ids).logits).abs().max() > 1e-2
        ours.save_pretrained(tmp_path / "ours")
        ours.load_adapter(tmp_path / "ours", "b", is_trainable=True)
        ours.set_adapter("b")
        assert torch.equal(ours(ids).logits, got)
        assert torch.equal(ours(inputs_embeds=base.get_input_embeddings()(ids)).logits, got)
    assert own(ours, "b")["P"].dtype == torch.float32
    assert torch.equal(own(ours, "b")["P"], theirs.prompt_encoder["default"].embedding.weight)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.equal(again(ids).logits[:, LENGTH:], got)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ours.float()
    assert torch.equal(tokens(ours, prompt, use_cache=False), tokens(ours, prompt))
