import copy

import pytest
import torch
import transformers as hf
from torch.testing import assert_close
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from peftc import compiler
from peftc.grammar.diagnostics import ModelError
from peftc.runtime import caches

WINDOW = 4
FULL = caches.Layer(2, 3, 5, None, torch.float32)
SLIDING = caches.Layer(2, 3, 3, WINDOW, torch.float32)


def keys_and_values(layers, length, rows=2):
    sizes = [size for each in layers for size in ((each.heads, each.key_size), (each.heads, each.value_size))]
    return [torch.randn(rows, heads, length, size) for heads, size in sizes]


@pytest.mark.parametrize("length", [1, 3, 4, 9])
def test_what_is_stored_is_read_again(length):
    """Of a window what lies outside is gone, and reads as zeros, which the mask hides."""
    layout = caches.Layout((FULL, SLIDING))
    tensors = keys_and_values(layout.own, length)
    cache = DynamicCache()
    caches.store(cache, layout, list(tensors))
    assert [type(each) for each in caches.build(layout, tensors).layers] == [DynamicLayer, DynamicSlidingWindowLayer]
    read = caches.read(caches.build(layout, tensors), layout, 2, torch.device("cpu"))
    assert [each.shape for each in read] == [each.shape for each in tensors]
    assert_close(read[:2], tensors[:2])
    kept = WINDOW - 1
    assert_close(read[2][:, :, -kept:], tensors[2][:, :, -kept:])
    assert not read[2][:, :, :-kept].any()


def test_a_window_is_cut_when_stored():
    layout = caches.Layout((SLIDING,))
    cache = caches.build(layout, keys_and_values(layout.own, 9))
    assert cache.layers[0].keys.shape[2] == WINDOW - 1
    assert cache.layers[0].cumulative_length == 9
    assert cache.get_seq_length() == 9


def test_untrimmed_for_a_trace():
    layout = caches.Layout((SLIDING,))
    tensors = keys_and_values(layout.own, 9)
    cache = caches.build(layout, tensors, trimmed=False)
    assert cache.layers[0].keys is tensors[0]
    assert caches.tensors_of(cache, layout)[1] is tensors[1]


def test_an_empty_cache_reads_as_length_zero():
    layout = caches.Layout((FULL, SLIDING))
    read = caches.read(DynamicCache(), layout, 3, torch.device("cpu"))
    assert [tuple(each.shape) for each in read] == [(3, 2, 0, 3), (3, 2, 0, 5), (3, 2, 0, 3), (3, 2, 0, 3)]


def test_the_layout_of_a_cache():
    layout = caches.Layout((FULL, SLIDING))
    assert caches.layout_of(caches.build(layout, keys_and_values(layout.own, 2)), False) == layout
    assert not layout.is_encoder_decoder


def test_encoder_decoder_filled_and_to_be_filled():
    empty, filled = (caches.Layout((FULL,), (FULL,), filled=each) for each in (False, True))
    own, cross = keys_and_values((FULL,), 2), keys_and_values((FULL,), 7)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert caches.kind_of(cache) == ("encoder-decoder", False)
    assert len(caches.read(cache, empty, 2, torch.device("cpu"))) == 2
    caches.store(cache, empty, own + cross)
    assert caches.kind_of(cache) == ("encoder-decoder", True)
    assert cache.is_updated == {0: True}
    assert_close(caches.read(cache, filled, 2, torch.device("cpu")), own + cross)
    longer = keys_and_values((FULL,), 3)
    caches.store(cache, filled, longer)
    assert_close(caches.read(cache, filled, 2, torch.device("cpu")), longer + cross)
    assert caches.layout_of(cache, True) == filled
    assert caches.tensors_of(cache, filled) == [longer[0], longer[1]]
    assert len(caches.tensors_of(cache, empty)) == 4


def test_kind_of_a_decoder_cache():
    assert caches.kind_of(DynamicCache()) == ("decoder", False)


@pytest.fixture(scope="module")
def mistral():
    torch.manual_seed(0)
    config = hf.MistralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=WINDOW,
    )
    model = hf.MistralForCausalLM(config).eval()
    adapted = compiler.apply(model, "adapter a = lora(rank = 2)").eval()  # B is zero: both compute the same
    return model, adapted


def test_caches_of_other_kinds_are_refused(mistral):
    model, adapted = mistral
    ids = torch.randint(0, 40, (2, 3))
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        with pytest.raises(ModelError, match="E410") as caught:
            adapted(input_ids=ids, past_key_values=cache)
    (found,) = caught.value.diagnostics
    assert found.message.startswith("a cache layer of kind Static")
    assert "DynamicCache" in found.help


@pytest.mark.parametrize("first", [2, 4, 7])
@pytest.mark.parametrize("order", ["theirs first", "ours first"])
def test_a_window_passes_between_us_and_transformers(first, order, mistral):
    """Across the window's end: what one began the other goes on with, and back."""
    torch.manual_seed(first)
    ids = torch.randint(0, 40, (2, first + 5))
    turns = list(mistral if order == "theirs first" else reversed(mistral))
    with torch.no_grad():
        expected = mistral[0](input_ids=ids, use_cache=False).logits
        cache = turns[0](input_ids=ids[:, :first], use_cache=True).past_key_values
        for turn, (start, end) in enumerate(((first, first + 1), (first + 1, first + 4), (first + 4, first + 5))):
            call = turns[(turn + 1) % 2]
            output = call(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
            assert output.past_key_values is cache
            assert_close(output.logits, expected[:, start:end], msg=f"tokens {start} to {end}")
    assert cache.get_seq_length() == first + 5


def test_a_cache_is_what_transformers_makes(mistral):
    ids = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        theirs, ours = (each(input_ids=ids, use_cache=True).past_key_values for each in mistral)
    for mine, reference in zip(ours.layers, theirs.layers, strict=True):
        assert type(mine) is type(reference)
        assert mine.cumulative_length == reference.cumulative_length
        assert_close((mine.keys, mine.values), (reference.keys, reference.values))


def test_a_copied_cache_goes_on_by_itself(mistral):
    """As when several continuations are tried from one prompt."""
    ids = torch.randint(0, 40, (2, 8))
    _, adapted = mistral
    with torch.no_grad():
        cache = adapted(input_ids=ids[:, :6], use_cache=True).past_key_values
        kept = copy.deepcopy(cache)
        once = adapted(input_ids=ids[:, 6:], past_key_values=cache).logits
        again = adapted(input_ids=ids[:, 6:], past_key_values=kept).logits
    assert_close(once, again)
