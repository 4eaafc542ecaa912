"""Every kind of cache: tokens are the base's own with no adapter, and those of a dynamic cache with one."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import CompileConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    QuantizedCache,
    QuantizedLayer,
    StaticCache,
)
from transformers.masking_utils import create_masks_for_generate

from tests.matrix import wide

NAMES = ("llama", "gpt2", "gemma3", "mistral", "t5")
WAYS: dict[str, dict[str, Any]] = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=1.5, top_k=20),
    "beam": dict(do_sample=False, num_beams=3),
}
NEAR = dict(atol=1e-5, rtol=1e-5)


class Stored(QuantizedLayer):
    """Quantizes nothing away, so that tokens can be compared."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> list[torch.Tensor]:
        return [tensor.clone()]

    def _dequantize(self, held: list[torch.Tensor]) -> torch.Tensor:
        return held[0]


@pytest.fixture(scope="module")
def models(zoo: Any) -> Iterator[Callable[[str], tuple[Any, Any]]]:
    """For each name the adapted model, its adapter away from where it starts, and the base."""
    hosts: dict[str, Any] = {}

    def pair(name: str) -> tuple[Any, Any]:
        if name not in hosts:
            host = hosts[name] = zoo.host(name)
            host.add_adapter("adapter kinds = lora(rank = 4, alpha = 16) { on all linear }")
            zoo.randomise(host)
        return hosts[name], zoo.model(name)

    yield pair
    for host in hosts.values():
        host.delete_adapter("kinds")


def _prompt(zoo: Any, name: str, rows: int, length: int) -> dict[str, torch.Tensor]:
    return {key: value for key, value in zoo.batch(name, rows, length).items() if not key.startswith("decoder")}


def _tokens(model: Any, prompt: dict[str, torch.Tensor], **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(**prompt, pad_token_id=0, **{"max_new_tokens": 10, "do_sample": False, **options})


def _ids(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(5, 128, (rows, length), generator=torch.Generator().manual_seed(length))


def _static(model: Any, length: int) -> Cache:
    return StaticCache(config=model.config, max_cache_len=length)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", wide(NAMES, ("llama",)))
def test_static(name: str, way: str, models: Any, zoo: Any) -> None:
    """Rows are padded on the left; what is generated goes past every sliding window."""
    ours, base = models(name)
    for rows, length in ((1, 4), (3, 9)):
        prompt, options = _prompt(zoo, name, rows, length), WAYS[way]
        got = _tokens(ours, prompt, cache_implementation="static", **options)
        assert torch.equal(got, _tokens(ours, prompt, **options))
    plain = _tokens(base, prompt, cache_implementation="static", **options)
    assert not torch.equal(got, plain)
    with ours.disable_adapter():
        assert torch.equal(_tokens(ours, prompt, cache_implementation="static", **options), plain)


@pytest.mark.parametrize("way", WAYS)
def test_quantized(way: str, models: Any, zoo: Any) -> None:
    """A residual of three tokens is quantized several times, and reordered by beams in between."""
    ours, base = models("llama")
    prompt, options = _prompt(zoo, "llama", 3, 9), WAYS[way]

    def caches() -> Cache:
        return Cache(layers=[Stored(residual_length=3) for _ in range(2)])

    cache = caches()
    assert torch.equal(_tokens(ours, prompt, past_key_values=cache, **options), _tokens(ours, prompt, **options))
    assert cache.get_seq_length() == 18
    plain = _tokens(base, prompt, past_key_values=caches(), **options)
    with ours.disable_adapter():
        assert torch.equal(_tokens(ours, prompt, past_key_values=caches(), **options), plain)


def test_quantized_to_eight_bits(models: Any) -> None:
    """transformers' own: what comes out of it is what the base would attend to."""
    ours, base = models("llama")
    ids, mask = _ids(12), torch.ones(2, 12, dtype=torch.long)
    cache = QuantizedCache("fp8", ours.config)
    with ours.disable_adapter(), torch.no_grad():
        ours(input_ids=ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
        got = ours(input_ids=ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
        own = QuantizedCache("fp8", base.config)
        base(input_ids=ids[:, :8], attention_mask=mask[:, :8], past_key_values=own)
        wanted = base(input_ids=ids[:, 8:], attention_mask=mask, past_key_values=own).logits
        exact = base(input_ids=ids, attention_mask=mask).logits[:, 8:]
    assert_close(got, wanted, **NEAR)
    assert cache.get_seq_length() == 12
    assert 1e-4 < (got - exact).abs().max() < 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU these work")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static", "quantized"])
def test_what_transformers_refuses_it_refuses_here(kind: str, models: Any, zoo: Any) -> None:
    said = []
    for model in models("llama"):
        # A torch for CUDA refuses the stream where there is no driver, a torch for processors what is done with it.
        with pytest.raises((AssertionError, ImportError, RuntimeError)) as caught:
            _tokens(model, _prompt(zoo, "llama", 1, 4), cache_implementation=kind)
        said.append((caught.type, str(caught.value)))
    assert said[0] == said[1]


class _NoStream:
    """The stream of a machine without a GPU: whatever was asked for is done."""

    def wait_stream(self, _: object) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
def test_offloaded(kind: Any, models: Any, zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = models("llama")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: _NoStream())
    monkeypatch.setattr(torch, "Stream", _NoStream)
    sizes = {"max_cache_len": 20} if kind is StaticCache else {}
    cache = kind(config=ours.config, offloading=True, **sizes)
    offloaded: list[int] = []
    monkeypatch.setattr(cache, "offload", lambda index, *_: offloaded.append(index))
    prompt = _prompt(zoo, "llama", 2, 6)
    assert torch.equal(_tokens(ours, prompt, past_key_values=cache), _tokens(ours, prompt))
    assert offloaded == [0, 1] * 10


@pytest.mark.parametrize("name", wide(["llama", "gemma3", "mistral"], ("llama",)))
def test_a_conversation(name: str, models: Any, zoo: Any) -> None:
    """Two turns in one buffer; reset, it serves another conversation."""
    ours, _ = models(name)
    cache = _static(ours, 40)
    for seed in (5, 6):
        prompt, more = _prompt(zoo, name, 2, seed), _ids(4)
        first = _tokens(ours, prompt, past_key_values=cache)
        ids = torch.cat([first, more], dim=1)
        mask = torch.cat([prompt["attention_mask"], torch.ones_like(ids[:, seed:])], dim=1)
        full = {"input_ids": ids, "attention_mask": mask}
        assert torch.equal(_tokens(ours, full, past_key_values=cache), _tokens(ours, full))
        cache.reset()


@pytest.mark.parametrize("name", wide(["llama", "gemma3", "mistral"], ("llama",)))
def test_a_prompt_in_chunks(name: str, models: Any, zoo: Any) -> None:
    ours, _ = models(name)
    prompt = _prompt(zoo, name, 2, 9)
    chunks = _tokens(ours, prompt, cache_implementation="static", prefill_chunk_size=4)
    assert torch.equal(chunks, _tokens(ours, prompt))


def test_static_caches_pass_between_us_and_transformers(models: Any) -> None:
    """Full and sliding layers; before a window is full, as it fills, and after."""
    ours, base = models("gemma3")
    ids = _ids(16)
    with ours.disable_adapter(), torch.no_grad():
        wanted = base(input_ids=ids).logits
        for turns in ((ours, base), (base, ours), (ours, ours)):
            cache, at = _static(base, 18), 0
            for step, count in enumerate((4, 1, 3, 1, 4, 1, 2)):
                output = turns[step % 2](input_ids=ids[:, at : at + count], past_key_values=cache)
                assert output.past_key_values is cache
                assert_close(output.logits, wanted[:, at : at + count], **NEAR)
                at += count
            assert int(cache.get_seq_length()) == 16


def test_static_over_an_encoder(models: Any, zoo: Any) -> None:
    """What we began transformers goes on with."""
    ours, base = models("t5")
    prompt = _prompt(zoo, "t5", 2, 6)
    cache = EncoderDecoderCache(_static(base, 20), _static(base, 6))
    assert torch.equal(_tokens(ours, prompt, past_key_values=cache), _tokens(ours, prompt))
    cache = EncoderDecoderCache(_static(base, 20), _static(base, 6))
    with ours.disable_adapter():
        first = _tokens(ours, prompt, past_key_values=cache, max_new_tokens=4)
    both = _tokens(base, prompt, decoder_input_ids=first, past_key_values=cache, max_new_tokens=6)
    assert torch.equal(both, _tokens(base, prompt))


@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
def test_finished_masks(kind: Any, models: Any, zoo: Any) -> None:
    """As `create_masks_for_generate` makes them: as wide as a buffer, or beginning where a window does."""
    ours, base = models("gemma3")
    batch = zoo.batch("gemma3", 3, 20)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, at = kind(config=base.config, max_cache_len=24) if kind is StaticCache else kind(config=base.config), 0
    with ours.disable_adapter(), torch.no_grad():
        wanted = base(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for count in (4, 1, 1, 3, 1, 5, 1, 4):
            here = slice(at, at + count)
            masks = create_masks_for_generate(base.config, torch.empty(3, count, 0), mask[:, : at + count], cache)
            got = ours(
                input_ids=ids[:, here], attention_mask=masks, position_ids=positions[:, here], past_key_values=cache
            ).logits
            seen = mask[:, here].bool()
            assert_close(got[seen], wanted[:, here][seen], **NEAR)
            at += count


def test_a_mask_as_wide_as_the_buffer(models: Any) -> None:
    ours, _ = models("llama")
    ids, mask = _ids(6), torch.ones(2, 10, dtype=torch.long)
    mask[0, :2] = 0
    cache = _static(ours, 10)
    with torch.no_grad():
        wanted = ours(input_ids=ids, attention_mask=mask[:, :6]).logits
        steps = [ours(input_ids=ids[:, a:b], attention_mask=mask, past_key_values=cache) for a, b in ((0, 4), (4, 6))]
    assert_close(torch.cat([each.logits for each in steps], dim=1)[:, 2:], wanted[:, 2:], **NEAR)


def test_static_and_dynamic_share_a_graph_of_the_whole_model(models: Any, zoo: Any) -> None:
    ours, _ = models("llama")
    prompt = _prompt(zoo, "llama", 2, 6)
    ours._adapter_state.regions = "model"
    try:
        wanted = _tokens(ours, prompt)
        traces = len(ours._adapter_state.engine._traces)
        assert torch.equal(_tokens(ours, prompt, cache_implementation="static"), wanted)
        assert len(ours._adapter_state.engine._traces) == traces > 0
    finally:
        ours._adapter_state.regions = "layers"


def test_compiled(models: Any) -> None:
    """The model's own Python is compiled, with the adapters in it: a static cache as well as transformers can."""
    ours, _ = models("llama")
    ids, mask, cache = _ids(6), torch.ones(2, 6, dtype=torch.long), _static(ours, 8)
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = ours(input_ids=ids, attention_mask=mask).logits[:, 5:]
        ours(input_ids=ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
        call = dict(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=cache)
        assert_close(torch.compile(ours, backend="eager", fullgraph=True)(**call).logits, wanted, **NEAR)
    torch._dynamo.reset()


def test_generate_compiles_only_when_asked(models: Any, zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where transformers compiles for every static cache. What was compiled stays with its model."""
    ours, _ = models("llama")
    monkeypatch.setattr(ours._adapter_state, "regions", "model")
    compiled: list[Any] = []
    monkeypatch.setattr(type(ours), "_valid_auto_compile_criteria", lambda *_: True)
    monkeypatch.setattr(torch, "compile", lambda call, **_: compiled.append(call) or call)
    prompt = _prompt(zoo, "llama", 2, 6)
    wanted = _tokens(ours, prompt)
    assert torch.equal(_tokens(ours, prompt, cache_implementation="static"), wanted)
    assert not compiled
    config = CompileConfig(backend="eager")
    assert torch.equal(_tokens(ours, prompt, cache_implementation="static", compile_config=config), wanted)
    assert compiled == [ours.__call__]
    assert "_compiled_call" in vars(ours)
    assert "_compiled_call" not in vars(copy.deepcopy(ours))
    del ours._compiled_call
