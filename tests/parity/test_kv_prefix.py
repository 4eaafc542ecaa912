"""Prefixes and cartridges started from keys and values, against PEFT and against the base with the text in front."""

import copy
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers as hf
from torch.testing import assert_close
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

from peftc.compiler.api import adapt
from peftc.grammar.diagnostics import UsageError
from tests.matrix import wide

LENGTH = 5
SIZES = dict(
    vocab_size=128,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
TEXT = " ".join(f"w{each}" for each in range(9))
TEMPLATE = "{% for each in messages %}<s> {{ each['content'] }}{% endfor %}"
NO_SYSTEM = "{{ raise_exception('System role not supported') }}"


def _tokenizer(template: str | None = None) -> Any:
    words = {"<s>": 1, "<unk>": 2, **{f"w{each}": 3 + 7 * each for each in range(12)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer


def _cartridge(name: str = "a", frozen: int = 1) -> str:
    return f"adapter {name} = cartridge(length = {LENGTH}, frozen = {frozen})"


def _config(kind: str) -> Any:
    return {
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH),
        "cartridge": peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, num_frozen_tokens=2),
    }[kind]


def _own(model: Any, name: str = "a") -> torch.Tensor:
    value: torch.Tensor = model.adapter_state_dict(name)["prompt_embeddings"]
    return value.detach().clone()


@pytest.mark.parametrize(("name", "kind"), wide([("llama", "cartridge"), ("gpt2", "prefix")], ("llama",)))
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_as_peft(name: str, kind: str, template: str | None, zoo: Any) -> None:
    theirs = peft.get_peft_model(copy.deepcopy(zoo.model(name)), _config(kind)).eval()
    tokenizer = _tokenizer(template)
    wanted = peft.initialize_kv_prefix_from_text(theirs, tokenizer, text=TEXT, max_length=LENGTH)
    long = peft.initialize_kv_prefix_from_text(theirs, tokenizer, text=TEXT)
    with zoo.hosted(name) as ours:
        ours.add_adapter(_config(kind), "a")
        got = ours.initialize_kv_prefix_from_text(tokenizer, text=TEXT, max_length=LENGTH)
        assert torch.equal(got, wanted)
        assert torch.equal(_own(ours), wanted)
        assert_close(ours.initialize_kv_prefix_from_text(tokenizer, text=TEXT), long, atol=1e-6, rtol=1e-5)
        zoo.same(ours, theirs, name, zoo.model(name))
        # What stands in front is the text: the model goes on as the base does behind it.
        ids = (tokenizer(("<s> " if template else "") + TEXT)["input_ids"])[:LENGTH]
        batch = zoo.batch(name, 1)
        behind = zoo.model(name)(torch.cat([torch.tensor([ids]), batch["input_ids"]], 1)).logits[:, LENGTH:]
        assert_close(ours(**batch).logits, behind, atol=1e-5, rtol=1e-5)


def test_a_window_leaves_nothing_out() -> None:
    """Sliding layers keep the last tokens of a text, and a prefix is its first."""
    base, tokenizer = hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=6)).eval(), _tokenizer()
    text = " ".join(f"w{each}" for each in range(12))
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    ours, kept = adapt(base), DynamicCache()
    ours.add_adapter("adapter a = prefix(length = 8)")
    got = ours.initialize_kv_prefix_from_text(tokenizer, text=text)
    base(ids, past_key_values=kept, use_cache=True)
    assert_close(ours.initialize_kv_prefix_from_past_key_values(past_key_values=kept), got, atol=1e-6, rtol=1e-5)
    behind = base(torch.cat([ids[:, :8], ids], 1)).logits[:, 8:]
    assert_close(ours(ids, attention_mask=torch.ones_like(ids)).logits, behind, atol=1e-5, rtol=1e-5)
    before = _own(ours)
    trimmed = base(ids, use_cache=True).past_key_values
    with pytest.raises(UsageError) as refused:
        ours.initialize_kv_prefix_from_past_key_values(past_key_values=trimmed)
    assert refused.value.diagnostics[0].code == "E571"
    assert "layer 0 of the cache keeps the last 5 of 12 tokens" in str(refused.value)
    assert torch.equal(_own(ours), before)


def test_caches_of_all_kinds(zoo: Any) -> None:
    base, ids = zoo.model("llama"), torch.tensor([[3, 10, 17, 24, 31, 38]])
    caches = [DynamicCache(), StaticCache(base.config, max_cache_len=16)]
    for each in caches:
        base(ids, past_key_values=each, use_cache=True)
    caches.append([(layer.keys, layer.values) for layer in caches[0].layers])
    with zoo.hosted("llama") as ours:
        ours.add_adapter(_cartridge())
        found = [ours.initialize_kv_prefix_from_past_key_values(past_key_values=each) for each in caches]
        theirs = peft.get_peft_model(copy.deepcopy(base), _config("cartridge"))
        wanted = peft.initialize_kv_prefix_from_past_key_values(theirs, past_key_values=caches[2])
    assert torch.equal(found[0], wanted)
    assert torch.equal(found[2], wanted)
    assert_close(found[1], wanted, atol=1e-6, rtol=1e-5)


def test_the_base_runs_in_evaluation_and_alone() -> None:
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, attention_dropout=0.5)).bfloat16()
    ours, tokenizer = adapt(base), _tokenizer()
    ours.add_adapter("adapter b = lora(rank = 2)")
    with torch.no_grad():
        for name, each in ours.named_parameters():
            each.add_(1.0 if name.startswith("adapter_bank") else 0.0)
    ours.add_adapter(_cartridge())
    ours.set_adapter(["b", "a"])
    ours.train()
    ours.model.norm.eval()
    got = ours.initialize_kv_prefix_from_text(tokenizer, text=TEXT)
    assert (ours.training, ours.model.norm.training, ours.active_adapters()) == (True, False, ["b", "a"])
    made = base.eval()(torch.tensor([tokenizer(TEXT)["input_ids"][:LENGTH]]), use_cache=True).past_key_values
    assert (got.dtype, _own(ours).dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(got.view(LENGTH, 2, 2, 8)[:, 1], made.layers[0].values[0].transpose(0, 1))
    assert torch.equal(_own(ours), got.float())


def test_what_cannot_start(zoo: Any) -> None:
    tokenizer, pairs = _tokenizer(), [(torch.ones(1, 2, LENGTH, 16),) * 2] * 2
    with zoo.hosted("llama") as ours:
        ours.add_adapter(_cartridge())
        ours.add_adapter(_cartridge("b"))
        ours.add_adapter(f"adapter p = prefix(length = {LENGTH}, projection = true)")
        ours.add_adapter("adapter l = lora(rank = 2)")
        before = {each: _own(ours, each) for each in "ab"}

        def refused(code: str, said: str, *, name: str | None = "a", given: Any = None, **options: Any) -> None:
            start, asked = ours.initialize_kv_prefix_from_text, {"tokenizer": tokenizer, "text": TEXT} | options
            if given is not None:
                start, asked = ours.initialize_kv_prefix_from_past_key_values, {"past_key_values": given}
            with pytest.raises(UsageError) as error:
                start(**asked, adapter_name=name)
            assert error.value.diagnostics[0].code == code
            assert said in str(error.value)

        refused("E569", "no active adapter has a prefix", name=None)
        refused("E569", "adapter 'l' puts nothing in front of the cache", name="l")
        refused("E570", "its prompt' is computed", name="p")
        refused("E571", "the text has 3 tokens, and the prefix of adapter 'a' 5", text="w1 w2 w3")
        refused("E571", "the text has 4 tokens, and the prefix of adapter 'a' 5", max_length=4)
        refused("E571", "layer 1 of the cache has 4 tokens, and the prefix 5", given=[pairs[0], _cut(pairs[0])])
        refused("E565", "is not a tokenizer", tokenizer="w1")
        refused("E566", "takes no system message: System role", tokenizer=_tokenizer(NO_SYSTEM))
        refused("E572", "a value of type str does not hold keys", given="w1")
        refused("E572", "beside an encoder", given=EncoderDecoderCache(DynamicCache(), DynamicCache()))
        refused("E572", "the cache has 1 layers, and the model 2", given=pairs[:1])
        refused("E572", "the cache is one of 3 texts", given=[(torch.ones(3, 2, LENGTH, 16),) * 2] * 2)
        refused("E572", "has 4 heads of 16 numbers, and the prefix 2 of 16", given=[(torch.ones(1, 4, 5, 16),) * 2] * 2)
        ours.set_adapter(["a", "b"])
        refused("E569", "2 active adapters have a prefix", name=None)
        assert all(torch.equal(_own(ours, each), before[each]) for each in "ab")
    for model, said in (("t5", "share the places"), ("bert", "keeps no cache of a text")):
        with zoo.hosted(model) as ours:
            ours.add_adapter(_cartridge())
            with pytest.raises(UsageError) as error:
                ours.initialize_kv_prefix_from_text(tokenizer, text=TEXT)
        assert error.value.diagnostics[0].code == "E570"
        assert said in str(error.value)


def _cut(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(each[:, :, :-1] for each in pair)


@pytest.mark.parametrize("frozen", [0, 2, LENGTH])
def test_frozen_tokens(frozen: int, zoo: Any, tmp_path: Any) -> None:
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, num_frozen_tokens=frozen)
    theirs = zoo.peft("llama", config)
    theirs.save_pretrained(tmp_path)
    batch = zoo.batch("llama", 1, 5)
    with zoo.hosted("llama") as ours:
        ours.load_adapter(tmp_path, "a", is_trainable=True)
        ours.set_adapter("a")
        zoo.same(ours, theirs, "llama", zoo.model("llama"))
        loss, wanted = (each(**batch).logits.square().mean() for each in (ours, theirs))
        wanted.backward()
        assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
        (own,) = (each for key, each in ours.named_parameters() if key.endswith(".P"))
        if frozen == LENGTH:
            assert not loss.requires_grad
            return
        loss.backward()
        assert not own.grad[:frozen].any()
        trained = theirs.prompt_encoder.default.trainable_embedding
        assert_close(own.grad[frozen:], trained.grad, atol=1e-5, rtol=1e-4)
