"""The contract with transformers, held against real models of the release that is installed."""

import inspect
from typing import Optional

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.cache_utils import Cache, EncoderDecoderCache

from peftc.passes.foreign.transformers import (
    COUNTS,
    Argument,
    Forward,
    argument_of,
    embedding_scale,
    feature_shape,
    forward_of,
    heads,
    image_shape,
    key_heads,
    layers,
    most_positions,
    name_of,
    renamed_cache,
    tells_parts,
    text_config,
    vocabulary_in,
    vocabulary_size,
    width,
)
from peftc.passes.ir.roles import Role, Stack

IDS = torch.tensor([[1, 2, 3]])
LLAMA = dict(
    vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)
GPT2 = dict(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)
T5 = dict(vocab_size=20, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, decoder_start_token_id=0)
CACHING = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
}


@pytest.mark.parametrize("kind", CACHING)
def test_the_cache_of_a_forward_is_what_is_filled(kind):
    model = CACHING[kind]().eval()
    forward = forward_of(model.forward)
    empty = DynamicCache() if kind != "t5" else EncoderDecoderCache(DynamicCache(), DynamicCache())
    more = {name_of(Role.TOKENS, Stack.DECODER): IDS} if kind == "t5" else {}
    model(input_ids=IDS, use_cache=True, **{forward.cache: empty}, **more)
    assert empty.get_seq_length() == IDS.shape[1]


@pytest.mark.parametrize("kind", [BertForMaskedLM, ViTModel])
def test_whether_a_forward_takes_a_cache(kind):
    taken = {name for name in inspect.signature(kind.forward).parameters if "cache" in name or "past" in name}
    found = forward_of(kind.forward).cache
    assert (found is None) == (not taken - {"use_cache"}), found


def test_a_cache_is_known_by_its_type_whatever_it_is_called():
    def typed(self, ids, memory: Cache | None = None): ...
    def quoted(self, ids, memory: "EncoderDecoderCache | None" = None): ...
    def optional(self, ids, memory: Optional[DynamicCache] = None): ...  # noqa: UP045
    def by_name(self, ids, past_key_values=None): ...
    def none(self, ids, cached: bool = False, use_cache: bool | None = None): ...

    assert [forward_of(each).cache for each in (typed, quoted, optional)] == ["memory"] * 3
    assert forward_of(by_name).cache == "past_key_values"
    assert forward_of(none).cache is None


def test_a_cache_gets_the_name_that_the_forward_has():
    cache, forward = DynamicCache(), Forward(frozenset({"ids", "memory"}), "memory")
    assert renamed_cache({"ids": 1, "past": cache}, forward, "past") == {"ids": 1, "memory": cache}
    for kept in ({"memory": cache}, {"past": 1, "memory": cache}):
        assert renamed_cache(kept, forward, next(iter(kept))) == kept
    assert renamed_cache({"past": cache}, Forward(frozenset(), None), "past") == {"past": cache}


# Every argument of these forwards that has a tensor for each token, and what it is for.
OF_TEXT = {
    "input_ids": Role.TOKENS,
    "attention_mask": Role.MASK,
    "position_ids": Role.POSITIONS,
    "token_type_ids": Role.TYPES,
    "inputs_embeds": Role.EMBEDDINGS,
    "labels": Role.LABELS,
}
SINGLE = (LlamaForCausalLM, GPT2LMHeadModel, BertForMaskedLM)


@pytest.mark.parametrize("kind", SINGLE)
def test_roles_in_a_model_of_one_stack(kind):
    taken = set(inspect.signature(kind.forward).parameters)
    assert {"input_ids", "attention_mask", "labels"} <= taken, (
        "the names that the contract has are those of the release"
    )
    for name in taken & set(OF_TEXT):
        assert argument_of(name, encoder_decoder=False) == Argument(OF_TEXT[name])


@pytest.mark.parametrize("kind", [T5ForConditionalGeneration, BartForConditionalGeneration])
def test_roles_in_a_model_of_two_stacks(kind):
    taken = set(inspect.signature(kind.forward).parameters)
    for stack in (Stack.ENCODER, Stack.DECODER):
        for role in (Role.TOKENS, Role.MASK, Role.EMBEDDINGS):
            assert name_of(role, stack) in taken
            assert argument_of(name_of(role, stack), encoder_decoder=True) == Argument(role, stack)
    assert argument_of("encoder_outputs.last_hidden_state", encoder_decoder=True).role == Role.ENCODED
    assert argument_of("labels", encoder_decoder=True) == Argument(Role.LABELS, Stack.DECODER)


def test_what_looks_like_a_role_and_is_none():
    assert argument_of("pixel_attention_mask", encoder_decoder=False).role == Role.OTHER_MASK
    assert argument_of("encoder_attention_mask", encoder_decoder=False).role == Role.OTHER_MASK
    assert argument_of("decoder_labels", encoder_decoder=True).role == Role.OTHER
    assert argument_of("speaker_ids", encoder_decoder=False).role == Role.IDS
    assert argument_of("attention_mask.full_attention", encoder_decoder=False).role == Role.MASK


def test_fields_of_configs():
    llama, gpt2 = LlamaConfig(**LLAMA, max_position_embeddings=32), GPT2Config(**GPT2)
    for config in (llama, gpt2):
        assert (vocabulary_size(config), layers(config), heads(config), width(config)) == (20, 1, 2, 8)
        assert vocabulary_in(config.to_dict()) == 20
    assert (key_heads(llama), key_heads(gpt2)) == (1, None)
    assert (most_positions(llama), most_positions(gpt2)) == (32, 16)
    assert text_config(None) is None
    assert vocabulary_size(None) == 2
    assert vocabulary_in([]) is vocabulary_in({"text_config": {}}) is None
    assert vocabulary_in({"text_config": {"vocab_size": 7}}) == 7
    assert tells_parts(BertConfig())
    assert not tells_parts(llama)
    assert BartConfig().is_encoder_decoder


def test_shapes_of_images_and_sounds_are_those_that_the_models_take():
    vit = ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    assert ViTModel(vit)(torch.zeros(1, *image_shape(vit))).last_hidden_state.shape[1] == 5
    small = dict(d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    whisper = WhisperConfig(**small, num_mel_bins=4, max_source_positions=6, vocab_size=20, pad_token_id=0)
    model = WhisperForConditionalGeneration(whisper)
    output = model(input_features=torch.zeros(1, *feature_shape(whisper)), decoder_input_ids=IDS)
    assert output.encoder_last_hidden_state.shape[1] == 6


def test_the_scale_of_an_embedding():
    class Scaled(torch.nn.Embedding):
        embed_scale = 3.0

    assert embedding_scale(Scaled(2, 2)) == (3.0, 1.0)
    assert embedding_scale(torch.nn.Embedding(2, 2)) == (1.0, 1.0)


def test_counts_are_arguments_of_losses():
    parameters = inspect.signature(LlamaForCausalLM(LlamaConfig(**LLAMA)).loss_function).parameters
    assert set(COUNTS) <= set(parameters)
