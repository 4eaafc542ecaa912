import copy

import pytest
import torch
import transformers as hf
from torch.testing import assert_close
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache
from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
    MtpCache,
    QuantizedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from peftc import compiler
from peftc.grammar.diagnostics import ModelError
from peftc.runtime.execution import caches

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


@pytest.mark.parametrize("length", [1, 3, 4, 6])
def test_buffers_are_written_with_what_is_new(length):
    """As transformers' own update would: the same buffers, the same counters."""
    layout = caches.Layout((FULL, SLIDING))
    tensors = keys_and_values(layout.own, 9)
    ours, theirs = buffers(12), buffers(12)
    for end in (length, length + 1, 9):
        seen = int(theirs.get_seq_length())
        for index in range(2):
            new = [each[:, :, seen:end] for each in tensors[2 * index : 2 * index + 2]]
            theirs.update(*new, index)
        read = caches.read(ours, layout, 2, torch.device("cpu"))
        assert [each.shape[2] for each in read] == [seen] * 4
        caches.store(
            ours, layout, [torch.cat([old, each[:, :, seen:end]], 2) for old, each in zip(read, tensors, strict=True)]
        )
        for mine, reference in zip(ours.layers, theirs.layers, strict=True):
            assert mine.get_seq_length() == reference.get_seq_length() == end
            assert_close((mine.keys, mine.values), (reference.keys, reference.values))
    read = caches.read(ours, layout, 2, torch.device("cpu"))
    assert_close(read[:2], tensors[:2])
    assert_close(read[2][:, :, -WINDOW:], tensors[2][:, :, -WINDOW:])
    assert not read[2][:, :, :-WINDOW].any()


def buffers(length):
    return Cache(layers=[StaticLayer(length), StaticSlidingWindowLayer(length, WINDOW)])


@pytest.mark.parametrize("layer", [StaticLayer(5), StaticSlidingWindowLayer(3, WINDOW)])
def test_a_buffer_that_is_too_short(layer):
    """Refused before anything is written; a buffer that cannot hold its window is too short as well."""
    layout = caches.Layout((FULL if type(layer) is StaticLayer else SLIDING,))
    cache, room = Cache(layers=[layer]), layer.max_cache_len
    caches.store(cache, layout, keys_and_values(layout.own, room))
    with pytest.raises(ModelError, match=rf"E412.*holds {room} tokens, and there are {room + 1}"):
        caches.store(cache, layout, keys_and_values(layout.own, room + 1))
    assert cache.get_seq_length() == room


def test_a_buffer_as_long_as_its_window_never_is():
    layout = caches.Layout((SLIDING,))
    cache = Cache(layers=[StaticSlidingWindowLayer(WINDOW, WINDOW)])
    caches.store(cache, layout, keys_and_values(layout.own, 3 * WINDOW))
    assert cache.get_seq_length() == 3 * WINDOW


def test_allocated_early_is_empty():
    cache = StaticCache(hf.LlamaConfig(num_hidden_layers=1), max_cache_len=5)
    cache.early_initialization(2, FULL.heads, 3, torch.float32, torch.device("cpu"))
    (keys, _) = caches.read(cache, caches.Layout((FULL,)), 2, torch.device("cpu"))
    assert keys.shape == (2, FULL.heads, 0, 3)


class Halves(QuantizedLayer):
    """Exact for the numbers below."""

    def _quantize(self, tensor, axis):
        return (2 * tensor).to(torch.int8), axis

    def _dequantize(self, held):
        return held[0] / 2


def test_quantized_and_reordered():
    """Beam search reorders what is quantized at the next update, and the residual at once: it reads as one."""
    layout = caches.Layout((FULL,))
    tensors = [torch.randint(-9, 9, each.shape) / 2 for each in keys_and_values(layout.own, 6)]
    cache = Cache(layers=[Halves(residual_length=4)])
    for end in (3, 5, 6):
        caches.store(cache, layout, [each[:, :, :end] for each in tensors])
    assert cache.layers[0]._quantized_keys[0].shape[2] == 3
    assert cache.layers[0].keys.shape[2] == 3
    assert_close(caches.read(cache, layout, 2, torch.device("cpu")), tensors)
    turned = torch.tensor([1, 0])
    cache.reorder_cache(turned)
    assert_close(caches.read(cache, layout, 2, torch.device("cpu")), [each[turned] for each in tensors])
    more = [torch.cat([each[turned], each[:, :, :1]], 2) for each in tensors]
    caches.store(cache, layout, more)
    assert cache.layers[0]._quantized_keys[0].shape[2] == 7
    assert_close(caches.read(cache, layout, 2, torch.device("cpu")), more)


def test_transformers_quantized_cache():
    layout = caches.Layout((FULL,))
    tensors = keys_and_values(layout.own, 6)
    ours, theirs = (QuantizedCache("fp8", hf.LlamaConfig(num_hidden_layers=1)) for _ in range(2))
    for start, end in ((0, 4), (4, 6)):
        caches.store(ours, layout, [each[:, :, :end] for each in tensors])
        kept = theirs.update(*(each[:, :, start:end] for each in tensors), 0)
    assert_close(caches.read(ours, layout, 2, torch.device("cpu")), list(kept))


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        (Cache(layers=[DynamicLayer(), LinearAttentionLayer()]), "a cache layer of kind LinearAttentionLayer"),
        (Cache(layers=[DynamicIndexedLayer()]), "a cache layer of kind DynamicIndexedLayer"),
        (Cache(layers=[LinearAttentionAndFullAttentionLayer()]), "a cache layer of kind LinearAttentionAndFull"),
        (EncoderDecoderCache(DynamicCache(), Cache(layers=[DynamicIndexedLayer()])), "a cache layer of kind DynamicI"),
        (MtpCache(), "a cache of kind MtpCache"),
    ],
)
def test_what_is_more_than_keys_and_values_is_refused(cache, said):
    with pytest.raises(ModelError, match="E410") as caught:
        caches.kind_of(cache)
    (found,) = caught.value.diagnostics
    assert found.message.startswith(said)
    assert "use_cache=False" in found.help


def test_static_caches_are_of_the_same_kind():
    static = EncoderDecoderCache(buffers(4), buffers(4))
    assert caches.kind_of(buffers(4)) == ("decoder", False)
    assert caches.kind_of(static) == ("encoder-decoder", False)
    layout = caches.Layout((FULL, SLIDING), (FULL, SLIDING))
    caches.store(static, layout, keys_and_values(layout.own + layout.cross, 3))
    assert caches.kind_of(static) == ("encoder-decoder", True)


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
