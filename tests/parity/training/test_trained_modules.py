"""`train`, `bias` and layer norms against PEFT: one copy for each adapter, tied or parted, merged exactly."""

import copy
from typing import Any

import peft
import pytest
import torch
import transformers as hf

from peftc.grammar.diagnostics import AdapterError, CheckpointError, SpecError, UsageError
from peftc.runtime.peft_format.checkpoint import checkpoint_keys

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=128)
HEAD = dict(task_type="SEQ_CLS", target_modules=["q_proj"])
QUERY = dict(target_modules=["q_proj"], r=2)
TOKENS = [17, 3]


def _lora(**fields: Any) -> peft.PeftConfig:
    return peft.LoraConfig(**{"r": 2, **fields})


CASES: dict[str, tuple[str, peft.PeftConfig]] = {
    "bert-head": ("small-bert", _lora(task_type="SEQ_CLS", target_modules=["query"])),
    "bert-head-behind-a-prompt": ("small-bert", peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
    "bert-biases": ("small-bert", _lora(target_modules=["query"], bias="all", modules_to_save=["classifier"])),
    "score": ("score", _lora(**HEAD)),
    "score-and-tokens": ("score", _lora(**HEAD, trainable_token_indices=TOKENS)),
    "mlp": ("score", _lora(**QUERY, modules_to_save=["layers.0.mlp"])),
    "norms": ("score", peft.LNTuningConfig(target_modules=["norm", "input_layernorm"])),
    "norms-and-head": ("score", peft.LNTuningConfig(target_modules=["norm"], modules_to_save=["score"])),
    "embedding": ("score", _lora(**QUERY, modules_to_save=["embed_tokens"])),
    "tied-tokens-and-norm": ("small-tied", _lora(**QUERY, trainable_token_indices=TOKENS, modules_to_save=["norm"])),
    **{
        f"tied-{'-'.join(names)}{'-ensured' * ensured}": (
            "small-tied", _lora(**QUERY, modules_to_save=names, ensure_weight_tying=ensured)
        )
        for names in (["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"])
        for ensured in (False, True)
    },
}  # fmt: skip
CLASSIFIERS = ("small-bert", "score")


@pytest.fixture(scope="module", autouse=True)
def small(zoo: Any) -> None:
    """Models of one layer, two of which classify."""
    torch.manual_seed(5)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    llama = hf.LlamaConfig(**SIZES, **tokens)
    zoo._models |= {
        "small-tied": hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **tokens, tie_word_embeddings=True)).eval(),
        "score": hf.LlamaForSequenceClassification(llama).eval(),
        "small-bert": hf.BertForSequenceClassification(hf.BertConfig(**SIZES)).eval(),
    }


def _loss(model: Any, name: str, zoo: Any) -> torch.Tensor:
    batch = zoo.batch(name, 3, 6)
    batch["input_ids"][:, -2] = 17
    labels = torch.tensor([1, 0, 1]) if name in CLASSIFIERS else zoo.labels(name, 3, 6)
    return model(**batch, labels=labels).loss


def _same(one: Any, other: Any, name: str, zoo: Any) -> None:
    batch = zoo.batch(name, 2, 5)
    batch["input_ids"][:, -1] = 17
    torch.testing.assert_close(zoo.logits(one, batch), zoo.logits(other, batch), atol=1e-5, rtol=1e-5)


def _grads(theirs: Any) -> dict[str, torch.Tensor]:
    """PEFT's gradients by the keys it saves the parameters by."""
    found = {}
    for name, each in theirs.named_parameters():
        if each.grad is not None:
            found[name.replace(".modules_to_save.default", "").replace(".default", "")] = each.grad
    return found


@pytest.mark.parametrize("case", CASES)
def test_both_directions(case: str, zoo: Any, tmp_path: Any) -> None:
    name, config = CASES[case]
    theirs = zoo.peft(name, copy.deepcopy(config))
    theirs.save_pretrained(tmp_path / "theirs")
    with zoo.hosted(name) as ours:
        ours.load_adapter(tmp_path / "theirs", "a", is_trainable=True)
        ours.set_adapter("a")
        assert (zoo.logits(ours, zoo.batch(name)) - zoo.logits(zoo.model(name), zoo.batch(name))).abs().max() > 1e-3
        _same(ours, theirs, name, zoo)
        wanted, got = (_loss(each, name, zoo) for each in (theirs, ours))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        wanted.backward()
        got.backward()
        grads, adapter = _grads(theirs), ours._adapter_state.adapter("a")
        compared = [key for key in checkpoint_keys(adapter.plan) if key in grads]
        for key in compared:
            own = adapter.tensor(checkpoint_keys(adapter.plan)[key]).grad
            torch.testing.assert_close(own, grads[key], atol=1e-5, rtol=1e-4, msg=key)
        assert {key for key in grads if "prompt_encoder" not in key} == set(compared)
        ours.save_pretrained(tmp_path / "ours", selected_adapters=["a"])
        leaked = ("original_module", "modules_to_save")  # PEFT saves biases of trained modules three times
        saved = {key for key in peft.get_peft_model_state_dict(theirs) if not any(each in key for each in leaked)}
        assert set(ours.adapter_state_dict("a")) == saved
        _same(zoo.reference(name, tmp_path / "ours"), ours, name, zoo)


# --- several adapters ---


def test_every_adapter_has_a_copy_of_its_own(zoo: Any, tmp_path: Any) -> None:
    batch = zoo.batch("score", 2, 5)
    theirs = zoo.peft("score", CASES["score"][1])
    theirs.add_adapter("b", _lora(**HEAD))
    zoo.randomise(theirs, 3)
    theirs.set_adapter("b")
    zoo.randomise(theirs, 4)
    theirs.save_pretrained(tmp_path)
    with zoo.hosted("score") as ours:
        base = zoo.logits(zoo.model("score"), batch)
        ours.load_adapter(tmp_path, "a")
        ours.load_adapter(tmp_path / "b", "b")
        ours.add_adapter("adapter c = lora(rank = 2) { on q_proj }")
        copies = [ours.get_parameter(f"adapter_bank.{name}.score.weight") for name in "ab"]
        assert not torch.equal(*copies)
        for name, other in {"a": "default", "b": "b"}.items():
            ours.set_adapter(name)
            theirs.set_adapter(other)
            torch.testing.assert_close(zoo.logits(ours, batch), zoo.logits(theirs, batch), atol=1e-5, rtol=1e-5)
            merged = ours.merge_and_unload()
            assert torch.equal(merged.score.weight, ours.get_parameter(f"adapter_bank.{name}.score.weight"))
            with ours.disable_adapter():
                assert torch.equal(zoo.logits(ours, batch), base)
        ours.set_adapter("c")  # as it starts, the base; its head is the base's
        assert torch.equal(zoo.logits(ours, batch), base)
        ours.set_adapter(["c", "a"])
        assert _code(UsageError, lambda: ours.set_adapter(["a", "b"])) == "E514"
        assert _code(UsageError, lambda: ours.set_adapter({"a": 0.5})) == "E513"
        assert ours.active_adapters() == ["c", "a"]
        ours.set_adapter("a")
        ours.save_pretrained(tmp_path / "ours")
        theirs.set_adapter("b")
        again = zoo.reference("score", tmp_path / "ours" / "b")
        torch.testing.assert_close(zoo.logits(again, batch), zoo.logits(theirs, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(beams: int, zoo: Any, tmp_path: Any) -> None:
    theirs = zoo.peft("small-tied", CASES["tied-lm_head"][1])
    zoo.randomise(theirs, scale=0.5)
    theirs.save_pretrained(tmp_path)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    batch = zoo.batch("small-tied", 2, 5)
    with zoo.hosted("small-tied") as ours:
        ours.load_adapter(tmp_path, "a")
        ours.set_adapter("a")
        got = ours.generate(**batch, **options)
        assert torch.equal(got, theirs.generate(**batch, **options))
        assert not torch.equal(got, zoo.model("small-tied").generate(**batch, **options))


# --- tied weights ---

TIES: dict[str, tuple[str, bool]] = {
    "tokens": ("trainable_tokens { tokens [17, 3] }", True),
    "tokens-of-the-head": ("trainable_tokens { tokens [17, 3] in lm_head }", False),
    "lora-on-the-embedding": ("lora(rank = 2) { on embed_tokens }", False),
    "lora-on-the-head": ("lora(rank = 2) { on lm_head }", False),
    "lora-on-both": ("lora(rank = 2) { on embed_tokens, lm_head }", False),
    "head": ("lora(rank = 2) { train lm_head }", False),
    "head-tied": ("lora(rank = 2) { train lm_head tied }", True),
    "both-tied": ("lora(rank = 2) { on q_proj train embed_tokens, lm_head tied }", True),
    "both-apart": ("lora(rank = 2) { train embed_tokens, lm_head }", False),
}


@pytest.mark.parametrize("case", TIES)
def test_merging_tied_weights_is_exact(case: str, zoo: Any, tmp_path: Any) -> None:
    spec, stays = TIES[case]
    with zoo.hosted("small-tied") as ours:
        ours.add_adapter(f"adapter a = {spec}")
        zoo.randomise(ours)
        merged = ours.merge_and_unload()
        assert (merged.lm_head.weight is merged.get_input_embeddings().weight) is stays
        assert merged.config.tie_word_embeddings is stays
        _same(merged, ours, "small-tied", zoo)
        batch = zoo.batch("small-tied", 2, 5)
        before = zoo.logits(ours, batch)
        assert (before - zoo.logits(zoo.model("small-tied"), batch)).abs().max() > 1e-3
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(zoo.logits(again, batch), before, atol=1e-6, rtol=1e-6)
        ours.merge_adapter()
        torch.testing.assert_close(zoo.logits(ours, batch), before, atol=1e-6, rtol=1e-6)
        ours.unmerge_adapter()
        assert torch.equal(zoo.logits(ours, batch), before)


@pytest.mark.parametrize(
    "config",
    [
        _lora(target_modules=["embed_tokens"]),
        _lora(target_modules=["lm_head"]),
        peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["lm_head"]),
    ],
    ids=["lora-on-the-embedding", "lora-on-the-head", "tokens-of-the-head"],
)
def test_peft_merges_what_is_tied_into_both(config: peft.PeftConfig, zoo: Any, tmp_path: Any) -> None:
    theirs = zoo.peft("small-tied", config)
    theirs.save_pretrained(tmp_path)
    batch = zoo.batch("small-tied", 2, 5)
    batch["input_ids"][:, -1] = 17
    wanted = zoo.logits(theirs, batch)
    with zoo.hosted("small-tied") as ours:
        ours.load_adapter(tmp_path, "a")
        ours.set_adapter("a")
        torch.testing.assert_close(zoo.logits(ours.merge_and_unload(), batch), wanted, atol=1e-5, rtol=1e-5)
    assert (zoo.logits(theirs.merge_and_unload(), batch) - wanted).abs().max() > 0.01


def test_a_tied_copy_is_one_tensor(zoo: Any) -> None:
    with zoo.hosted("small-tied") as ours:
        ours.add_adapter("adapter a = lora(rank = 2) { train lm_head tied }")
        (copied,) = ours.adapter_plan("a").copies
        assert copied.names("weight") == ("lm_head.weight", "model.embed_tokens.weight")
        ours.add_adapter("adapter b = lora(rank = 2) { train embed_tokens }")
        assert _code(UsageError, lambda: ours.set_adapter(["a", "b"])) == "E514"


def test_what_is_tied_in_part_is_refused(zoo: Any, tmp_path: Any) -> None:
    with zoo.hosted("small-tied") as ours:
        tokens = "adapter a = lora { on q_proj train embed_tokens tied tokens [5] in lm_head }"
        assert _code(SpecError, lambda: ours.add_adapter(tokens)) == "E231"
        ours.add_adapter("adapter a = lora(rank = 2) { on lm_head train embed_tokens tied }")
        assert _code(CheckpointError, lambda: ours.save_pretrained(tmp_path)) == "E326"
        assert not list(tmp_path.iterdir())
        ours.add_adapter("adapter b = ia3 { on q_proj train embed_tokens tied }")
        assert _code(CheckpointError, lambda: ours.save_pretrained(tmp_path)) == "E326"


def _code(kind: type[AdapterError], action: Any) -> str:
    with pytest.raises(kind) as caught:
        action()
    return caught.value.diagnostics[0].code
