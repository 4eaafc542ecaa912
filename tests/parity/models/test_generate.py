"""Generated tokens are PEFT's tokens, and the base's own where no adapter is enabled."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers.cache_utils import DynamicCache

from tests.matrix import wide

WAYS: dict[str, dict[str, Any]] = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=1.5, top_k=20),
    "beam": dict(do_sample=False, num_beams=3),
    "no-cache": dict(do_sample=False, use_cache=False),
}
TRACED = [
    (name, way) for name in ("llama", "gpt2", "t5", "moe", "gemma3", "mistral") for way in WAYS if way != "no-cache"
]
CASES = [*TRACED, ("tied", "greedy"), ("llama", "no-cache"), ("t5", "no-cache")]


@pytest.fixture(scope="module")
def pairs(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """For each model: the adapted one and PEFT's, of one checkpoint."""
    made: dict[str, tuple[Any, Any]] = {}

    def pair(name: str) -> tuple[Any, Any]:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            theirs = zoo.peft(name, peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
            theirs.save_pretrained(directory)
            ours = zoo.host(name)
            ours.load_adapter(directory, "pair")
            made[name] = (ours, theirs)
        return made[name]

    yield pair
    for ours, _ in made.values():
        ours.delete_adapter("pair")


def _prompt(zoo: Any, name: str, rows: int, length: int) -> dict[str, torch.Tensor]:
    return {key: value for key, value in zoo.batch(name, rows, length).items() if not key.startswith("decoder")}


def _tokens(model: Any, prompt: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    torch.manual_seed(3)
    return model.generate(**prompt, pad_token_id=0, **{"max_new_tokens": 10, **options})


@pytest.mark.parametrize(("name", "way"), wide(CASES, ("llama", "t5", "gemma3")))
def test_tokens(name: str, way: str, pairs: Any, zoo: Any) -> None:
    ours, theirs = pairs(name)
    for rows, length in ((1, 4), (3, 9)):
        prompt = _prompt(zoo, name, rows, length)
        got, wanted = _tokens(ours, prompt, **WAYS[way]), _tokens(theirs, prompt, **WAYS[way])
        assert torch.equal(got, wanted)
    base = _tokens(zoo.model(name), prompt, **WAYS[way])
    assert not torch.equal(base, got)
    with ours.disable_adapter():
        assert torch.equal(_tokens(ours, prompt, **WAYS[way]), base)


@pytest.mark.parametrize("name", wide(["llama", "gpt2", "gemma3", "mistral"], ("llama", "gemma3")))
def test_continuation_from_a_returned_cache(name: str, pairs: Any, zoo: Any) -> None:
    """The second turn, from the first turn's cache, goes on past every sliding window."""
    ours, theirs = pairs(name)
    more = torch.randint(5, 128, (2, 5), generator=torch.Generator().manual_seed(8))
    turns = []
    for model in (ours, theirs):
        prompt = _prompt(zoo, name, 2, 5)
        first = _tokens(model, prompt, max_new_tokens=2 * zoo.window, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, more], dim=1)
        mask = torch.cat([prompt["attention_mask"], torch.ones_like(ids[:, 5:])], dim=1)
        full = {"input_ids": ids, "attention_mask": mask}
        second = _tokens(model, full, past_key_values=first.past_key_values, max_new_tokens=6)
        assert torch.equal(second, _tokens(model, full, max_new_tokens=6))
        turns.append(second)
    assert torch.equal(turns[0], turns[1])


def test_caches_pass_between_us_and_transformers(pairs: Any, zoo: Any) -> None:
    """A model with sliding and full layers, so that both kinds of cache layer cross."""
    ours, theirs = pairs("gemma3")
    ids = torch.randint(5, 128, (2, 12), generator=torch.Generator().manual_seed(4))
    wanted = theirs(input_ids=ids).logits[:, 9:]
    for first, second in ((ours, theirs), (theirs, ours), (ours, ours)):
        with torch.no_grad():
            cache = first(input_ids=ids[:, :9], use_cache=True).past_key_values
            assert type(cache) is DynamicCache
            assert cache.get_seq_length() == 9
            steps = [second(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(9, 12)]
            assert cache.get_seq_length() == 12
        torch.testing.assert_close(torch.cat(steps, dim=1), wanted, atol=1e-5, rtol=1e-5)


def test_explicit_empty_cache(pairs: Any, zoo: Any) -> None:
    ours, theirs = pairs("llama")
    batch = zoo.batch("llama", 2, 6)
    cache = DynamicCache(config=ours.config)
    with torch.no_grad():
        out = ours(**batch, past_key_values=cache)
        assert out.past_key_values is cache
        torch.testing.assert_close(out.logits[1], theirs(**batch).logits[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", wide(["gemma3", "mistral"], ("gemma3",)))
def test_prompts_longer_than_the_window(name: str, pairs: Any, zoo: Any) -> None:
    ours, theirs = pairs(name)
    prompt = _prompt(zoo, name, 3, 4 * zoo.window)
    options = dict(max_new_tokens=2 * zoo.window, do_sample=False)
    assert torch.equal(_tokens(ours, prompt, **options), _tokens(theirs, prompt, **options))


def test_merged_and_switched_between_calls(pairs: Any, zoo: Any, tmp_path: Path) -> None:
    ours, theirs = pairs("llama")
    prompt = _prompt(zoo, "llama", 2, 6)
    wanted = _tokens(theirs, prompt)
    ours.merge_adapter()
    try:
        assert torch.equal(_tokens(ours, prompt), wanted)
    finally:
        ours.unmerge_adapter()
    plain = ours.merge_and_unload()
    assert torch.equal(_tokens(plain, prompt), wanted)


def test_tokens_can_differ(pairs: Any, zoo: Any) -> None:
    ours, theirs = pairs("llama")
    prompt = _prompt(zoo, "llama", 2, 6)
    bank = [each for name, each in ours.named_parameters() if "adapter_bank.pair" in name]
    kept = bank[1].detach().clone()
    with torch.no_grad():
        bank[1].add_(3.0)
        assert not torch.equal(_tokens(ours, prompt), _tokens(theirs, prompt))
        bank[1].copy_(kept)
    assert torch.equal(_tokens(ours, prompt), _tokens(theirs, prompt))
