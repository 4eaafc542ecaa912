import pytest
import torch
import transformers as hf
from torch.testing import assert_close
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.masking_utils import create_masks_for_generate

from peftc.runtime.execution import masks

WINDOW, LENGTH = 4, 12
SIZES = dict(num_hidden_layers=2, num_attention_heads=1, hidden_size=4, sliding_window=WINDOW)
MIXED = hf.Gemma3TextConfig(**SIZES, head_dim=4, layer_types=["sliding_attention", "full_attention"])
SLIDING = hf.MistralConfig(**SIZES, num_key_value_heads=1)
FULL = hf.LlamaConfig(num_hidden_layers=2, num_attention_heads=1, hidden_size=4)
CONFIGS = pytest.mark.parametrize("config", [MIXED, SLIDING, FULL], ids=["mixed", "sliding", "full"])


def caches(config, seen):
    """Every kind, with so many tokens in it."""
    for cache in (StaticCache(config, max_cache_len=LENGTH), DynamicCache(config=config)):
        if seen:
            for index in range(2):
                cache.update(torch.ones(1, 1, seen, 4), torch.ones(1, 1, seen, 4), index)
        yield cache


def seen_by(mask, kind, seen, new):
    """The law itself: earlier tokens that are not padding, of a window only the last."""
    at, past = torch.arange(seen, seen + new)[:, None], torch.arange(seen + new)
    allowed = (past <= at) & mask[0, : seen + new].bool()
    return allowed & (past > at - WINDOW) if kind == "sliding_attention" else allowed


@CONFIGS
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("seen", "new"), [(0, 3), (0, 7), (2, 1), (3, 3), (4, 1), (6, 1), (6, 3), (9, 1)])
def test_finished_masks_cover_all_tokens(seen, new, implementation, config):
    config._attn_implementation = implementation
    padding = torch.ones(1, seen + new, dtype=torch.long)
    padding[0, 0] = 0
    for cache in caches(config, seen):
        made = create_masks_for_generate(config, torch.empty(1, new, 0), padding, cache)
        call = {"input_ids": torch.ones(1, new), "attention_mask": made, "past_key_values": cache}
        fitted = masks.fit(call, cache)["attention_mask"]
        alone = "sliding_attention" if config is SLIDING else "full_attention"
        for kind, mask in fitted.items() if isinstance(fitted, dict) else [(alone, fitted)]:
            wanted = seen_by(padding, kind, seen, new)
            if mask is None:  # transformers leaves out what hides nothing
                continue
            assert mask.shape == (1, 1, new, seen + new)
            got = mask[0, 0] if mask.dtype is torch.bool else mask[0, 0] == 0
            rows = wanted.any(-1)  # a row that sees nothing may see anything
            assert_close(got[rows], wanted[rows])


@CONFIGS
def test_masks_that_fit_are_left(config):
    for cache in caches(config, 5):
        for mask in (torch.ones(1, 6), torch.ones(1, 1, 1, 6), torch.ones(1, 1, 1, 7), None):
            call = {"input_ids": torch.ones(1, 1), "attention_mask": mask, "past_key_values": cache}
            fitted = masks.fit(call, cache)["attention_mask"]
            assert fitted is mask or torch.equal(fitted, mask)


def test_a_flat_mask_as_wide_as_the_buffer():
    static, dynamic = caches(FULL, 5)
    mask = torch.arange(LENGTH)[None]
    for given in ({"input_ids": torch.ones(1, 2)}, {"inputs_embeds": torch.ones(1, 2, 4)}):
        call = {**given, "attention_mask": mask}
        assert_close(masks.fit(call, static)["attention_mask"], mask[:, :7])
        assert masks.fit(call, dynamic)["attention_mask"] is mask


def test_the_decoders_mask():
    own, _ = caches(FULL, 5)
    cache = EncoderDecoderCache(own, DynamicCache())
    mask = torch.arange(LENGTH)[None]
    call = {"decoder_input_ids": torch.ones(1, 1), "attention_mask": mask, "decoder_attention_mask": mask}
    fitted = masks.fit(call, cache, is_encoder_decoder=True)
    assert fitted["attention_mask"] is mask
    assert_close(fitted["decoder_attention_mask"], mask[:, :6])
