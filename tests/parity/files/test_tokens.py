"""Trained tokens against PEFT: alone and beside LoRA, tied and untied; and what PEFT does not do."""

import copy
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers as hf

from peftc import compiler
from peftc.grammar.diagnostics import AdapterError, CheckpointError, SpecError, UsageError
from tests.matrix import wide

MODELS = {"llama": "q_proj", "tied": "q_proj", "gpt2": "c_attn", "t5": "q"}
TOKENS = [17, 3, 0]  # one that pads
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "beam": {"num_beams": 3}}


def _config(way: str, name: str, zoo: Any) -> peft.PeftConfig:
    embedding = {"gpt2": "transformer.wte", "t5": "shared"}.get(name, "model.embed_tokens")
    if way == "alone":
        return peft.TrainableTokensConfig(token_indices=TOKENS)
    if way == "head":
        return peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["lm_head"])
    both = {embedding: [17], "lm_head": [3, 17]}
    more = {"ensure_weight_tying": True, "trainable_token_indices": TOKENS} if way == "ensured" else {}
    fields = {"trainable_token_indices": both if way == "apart" else TOKENS, **more}
    return peft.LoraConfig(r=2, target_modules=[MODELS[name]], **fields)


def _loss(model: Any, name: str, zoo: Any) -> torch.Tensor:
    batch = zoo.batch(name, 3, 6)
    batch["labels"] = zoo.labels(name, 3, 6)
    batch["input_ids"][:, -2] = 17
    batch["labels"][:, 1] = 3
    return model(**batch).loss


@pytest.mark.parametrize("way", ["alone", "lora", "ensured", "apart", "head"])
@pytest.mark.parametrize("name", wide(MODELS, ("llama", "tied")))
def test_both_directions(name: str, way: str, zoo: Any, tmp_path: Any) -> None:
    theirs = zoo.peft(name, _config(way, name, zoo))
    theirs.save_pretrained(tmp_path / "theirs")
    with zoo.hosted(name) as ours:
        ours.load_adapter(tmp_path / "theirs", "a", is_trainable=True)
        ours.set_adapter("a")
        zoo.same(ours, theirs, name)
        wanted, got = (_loss(each, name, zoo) for each in (theirs, ours))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        wanted.backward()
        got.backward()
        rows = {tuple(each.shape): each.grad for key, each in theirs.named_parameters() if "tokens_delta" in key}
        own = {tuple(each.shape): each.grad for key, each in ours.named_parameters() if key.endswith(".rows")}
        assert set(own) == set(rows)
        for shape, grad in own.items():
            torch.testing.assert_close(grad, rows[shape], atol=1e-5, rtol=1e-4)
        assert any(each.abs().max() > 1e-4 for each in own.values())
        ours.save_pretrained(tmp_path / "ours", selected_adapters=["a"])  # a lone adapter, so no directory of its own
        assert set(ours.adapter_state_dict("a")) == set(peft.get_peft_model_state_dict(theirs))
        zoo.same(zoo.reference(name, tmp_path / "ours"), ours, name)
        ours.merge_adapter()
        zoo.same(ours, theirs, name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", wide(["tied", "gpt2", "t5"], ("tied",)))
def test_generate(name: str, way: str, zoo: Any, tmp_path: Any) -> None:
    theirs = zoo.peft(name, _config("lora", name, zoo))
    zoo.randomise(theirs, scale=0.5)
    theirs.save_pretrained(tmp_path)
    batch = zoo.batch(name, 2, 5)
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **WAYS[way]}
    with zoo.hosted(name) as ours:
        ours.load_adapter(tmp_path, "a")
        ours.set_adapter("a")
        got = ours.generate(**prompt, **options)
        assert torch.equal(got, theirs.generate(**prompt, **options))
        assert name == "t5" or not torch.equal(got, zoo.model(name).generate(**prompt, **options))


@pytest.mark.parametrize("name", wide(["tied", "t5"], ("tied",)))
def test_merging_keeps_a_tie_exactly(name: str, zoo: Any) -> None:
    with zoo.hosted(name) as ours:
        ours.add_adapter(f"adapter a = trainable_tokens {{ tokens {TOKENS} }}")
        zoo.randomise(ours)
        merged = ours.merge_and_unload()
        assert merged.lm_head.weight is merged.get_input_embeddings().weight
        assert merged.config.tie_word_embeddings
        base, rows = zoo.model(name).lm_head.weight, ours.get_parameter(_rows(ours))
        wanted = base.detach().clone()
        wanted[TOKENS] = rows.detach()
        assert torch.equal(merged.lm_head.weight, wanted)
        zoo.same(merged, ours, name, base=zoo.model(name))
        assert ours.unload().lm_head.weight.data_ptr() == base.data_ptr()


def test_rows_of_the_head_alone_part_what_was_tied(zoo: Any) -> None:
    with zoo.hosted("tied") as ours:
        ours.add_adapter("adapter a = trainable_tokens { tokens [5] in lm_head }")
        zoo.randomise(ours)
        merged = ours.merge_and_unload()
        assert not merged.config.tie_word_embeddings
        assert torch.equal(merged.get_input_embeddings().weight, zoo.model("tied").lm_head.weight)
        zoo.same(merged, ours, "tied", base=zoo.model("tied"))


def test_several_adapters(zoo: Any) -> None:
    with zoo.hosted("tied") as ours:
        for name, what in {"a": "tokens [5, 6]", "b": "tokens [9]", "c": "tokens [7, 6]"}.items():
            ours.add_adapter(f"adapter {name} = trainable_tokens {{ {what} }}")
            zoo.randomise(ours)
        ours.add_adapter("adapter d = dora(rank = 2) { on embed_tokens, lm_head }")
        zoo.randomise(ours)
        ours.add_adapter("adapter e = lora(rank = 2) { train lm_head }")
        ours.set_adapter(["a", "b", "d"])
        zoo.same(ours.merge_and_unload(), ours, "tied", base=zoo.model("tied"))
        ours.set_adapter(["d", "a"])
        zoo.same(ours.merge_and_unload(), ours, "tied", base=zoo.model("tied"))
        assert _code(UsageError, lambda: ours.set_adapter(["a", "c"])) == "E558"
        assert _code(UsageError, lambda: ours.set_adapter(["e", "a"])) == "E559"
        assert _code(UsageError, lambda: ours.set_adapter({"a": 0.5})) == "E513"
        assert ours.active_adapters() == ["d", "a"]


def test_switching_rebinds(zoo: Any) -> None:
    with zoo.hosted("tied") as ours:
        for name, tokens in {"a": [5, 6], "b": [9, 4, 8]}.items():
            ours.add_adapter(f"adapter {name} = trainable_tokens {{ tokens {tokens} }}")
            zoo.randomise(ours)
        batch = zoo.batch("tied")
        batch["input_ids"][:, -1] = 9
        second = zoo.logits(ours, batch)
        ours.set_adapter("a")
        first = zoo.logits(ours, batch)
        ours.set_adapter("b")
        assert torch.equal(zoo.logits(ours, batch), second)
        assert (first - second).abs().max() > 1e-3
        assert torch.equal(zoo.logits(copy.deepcopy(ours), batch), second)


@pytest.mark.parametrize("kind", ["bfloat16", "autocast", "compile"])
def test_other_ways_to_run(kind: str, zoo: Any) -> None:
    model = copy.deepcopy(zoo.model("tied"))
    model = model.to(torch.bfloat16) if kind == "bfloat16" else model
    theirs = zoo.randomise(peft.get_peft_model(copy.deepcopy(model), peft.TrainableTokensConfig(token_indices=[5, 17])))
    ours = compiler.apply(model, "adapter a = trainable_tokens { tokens [5, 17] }").eval()
    rows = next(each for key, each in theirs.named_parameters() if "tokens_delta" in key)
    with torch.no_grad():
        ours.get_parameter(_rows(ours)).copy_(rows)
    assert ours.get_parameter(_rows(ours)).dtype == rows.dtype == torch.float32
    batch = zoo.batch("tied")
    batch["input_ids"][:, -1] = 17
    run = torch.compile(ours, backend="eager") if kind == "compile" else ours
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        wanted, got = zoo.logits(theirs.eval(), batch), zoo.logits(run, batch)
    near = 1e-5 if kind == "compile" else 0.02
    torch.testing.assert_close(got, wanted, atol=near, rtol=near)


# --- new tokens ---


@pytest.fixture
def tokenizer() -> Any:
    words = {**{f"w{index}": index for index in range(127)}, "<unk>": 127}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made = hf.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    made.add_tokens(["<tool>", "</tool>"])
    return made


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_new_tokens(name: str, zoo: Any, tokenizer: Any, tmp_path: Any) -> None:
    model = zoo.model(name)
    before = zoo.snapshot(model)
    spec = 'adapter a = lora(rank = 2) { tokens ["<tool>", "</tool>", "w5"] }'
    ours = zoo.randomise(compiler.apply(model, spec, tokenizer=tokenizer))
    before.check()
    assert ours.config.vocab_size == ours.get_input_embeddings().num_embeddings == 130
    assert [each.ids for each in ours.adapter_plan("a").rows] == [(128, 129, 5)] * (2 - (name == "tied"))
    batch = zoo.batch(name)
    batch["input_ids"][:, -2] = 129
    wanted = zoo.logits(ours.merge_and_unload().eval(), batch)  # which needs no trace
    assert wanted.shape[-1] == 130

    ours.save_pretrained(tmp_path)
    again = compiler.load(model, tmp_path)
    before.check()
    torch.testing.assert_close(zoo.logits(again.merge_and_unload().eval(), batch), wanted, atol=1e-5, rtol=1e-5)
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(130)
    theirs = peft.PeftModel.from_pretrained(resized, tmp_path).eval()
    torch.testing.assert_close(zoo.logits(theirs, batch), wanted, atol=1e-5, rtol=1e-5)

    beside = compiler.apply(model, "adapter z = lora(rank = 2)")
    beside.add_adapter(spec, "b", tokenizer=tokenizer)
    assert beside.config.vocab_size == 130
    before.check()


def test_new_tokens_that_nobody_chose(zoo: Any, tokenizer: Any, tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match="the tokens 128 are new"):
        ours = compiler.apply(zoo.model("tied"), 'adapter a = lora { tokens ["</tool>"] }', tokenizer=tokenizer)
    ours.save_pretrained(tmp_path)
    assert _code(CheckpointError, lambda: compiler.load(zoo.model("tied"), tmp_path)) == "E362"


def test_an_adapter_of_the_old_size_forbids_a_new_one(zoo: Any, tokenizer: Any) -> None:
    ours = compiler.apply(zoo.model("tied"), "adapter a = lora { train lm_head }")
    spec = 'adapter b = trainable_tokens { tokens ["<tool>", "</tool>"] }'
    assert _code(UsageError, lambda: ours.add_adapter(spec, tokenizer=tokenizer)) == "E530"
    assert ours.config.vocab_size == 128
    assert ours._adapter_state.names() == ("a",)


@pytest.mark.parametrize("token", ["<tol>", "two words", "<unk"])
def test_a_text_is_one_token(token: str, zoo: Any, tokenizer: Any) -> None:
    spec = f'adapter a = lora {{ tokens ["{token}", "</tool>"] }}'
    with pytest.raises(SpecError) as caught:
        compiler.apply(zoo.model("tied"), spec, tokenizer=tokenizer)
    (found,) = caught.value.diagnostics
    assert found.code == "E228"
    assert "add_tokens" in found.help
    assert ("did you mean" in found.help) is (token != "two words")


def _rows(model: Any) -> str:
    return next(key for key, _ in model.named_parameters() if key.endswith(".rows"))


def _code(kind: type[AdapterError], action: Any) -> str:
    with pytest.raises(kind) as caught:
        action()
    return caught.value.diagnostics[0].code
