import pytest
import torch

from peftc.compiler.trace.samples import SIZES, Sample, Sampler, plain_sample
from peftc.passes.foreign.transformers import argument_of
from peftc.passes.ir.inputs import BATCH, PAST, SEQUENCE, SOURCE

LONG = torch.long
ROWS, QUERY, SEEN = SIZES[BATCH], SIZES[SEQUENCE], SIZES[PAST] + SIZES[SEQUENCE]
B, S, P, E = (BATCH,), (SEQUENCE,), (PAST, SEQUENCE), (SOURCE,)


def test_sizes_of_different_meaning_differ_and_are_neither_0_nor_1():
    sizes = [*SIZES.values(), SEEN]
    assert len(set(sizes)) == len(sizes)
    assert min(sizes) > 1


DECODER = [
    ("input_ids", (2, 9), LONG, (ROWS, QUERY), (B, S)),
    ("attention_mask", (2, 9), LONG, (ROWS, SEEN), (B, P)),
    ("attention_mask", (2, 1, 9, 12), torch.float32, (ROWS, 1, QUERY, SEEN), (B, 1, S, P)),
    ("attention_mask.full_attention", (2, 1, 9, 12), torch.float32, (ROWS, 1, QUERY, SEEN), (B, 1, S, P)),
    ("position_ids", (2, 9), LONG, (ROWS, QUERY), (B, S)),
    ("position_ids", (1, 9), LONG, (1, QUERY), (1, S)),
    ("position_ids", (3, 2, 9), LONG, (3, ROWS, QUERY), (3, B, S)),
    ("token_type_ids", (2, 9), LONG, (ROWS, QUERY), (B, S)),
    ("inputs_embeds", (2, 9, 16), torch.float32, (ROWS, QUERY, 16), (B, S, 16)),
    ("labels", (2, 9), LONG, (ROWS, QUERY), (B, S)),
    ("labels", (2,), LONG, (ROWS,), (B,)),
    ("labels", (2, 4), torch.float32, (ROWS, 4), (B, 4)),
    ("cache_position", (9,), LONG, (QUERY,), (S,)),
    ("input_values", (2, 400), torch.float32, (ROWS, 400), (B, None)),
    ("input_values", (2, 1), torch.float32, (ROWS, 2), (B, None)),
    ("pixel_values", (2, 3, 8, 8), torch.float32, (ROWS, 3, 8, 8), (B, 3, 8, 8)),
    ("scale", (), torch.float32, (), ()),
]


@pytest.mark.parametrize(("name", "shape", "dtype", "expected", "axes"), DECODER)
def test_decoder(name, shape, dtype, expected, axes):
    sampler = Sampler(past=True, rows=2)
    argument = argument_of(name, encoder_decoder=False)
    assert sampler.sample(argument, torch.zeros(shape, dtype=dtype)) == Sample(expected, axes)


ENCODER_DECODER = [
    ("input_ids", (2, 9), LONG, (ROWS, SIZES[SOURCE]), (B, E)),
    ("attention_mask", (2, 9), LONG, (ROWS, SIZES[SOURCE]), (B, E)),
    ("decoder_input_ids", (2, 4), LONG, (ROWS, QUERY), (B, S)),
    ("decoder_attention_mask", (2, 4), LONG, (ROWS, SEEN), (B, P)),
    ("encoder_outputs.last_hidden_state", (2, 9, 16), torch.float32, (ROWS, SIZES[SOURCE], 16), (B, E, 16)),
]


@pytest.mark.parametrize(("name", "shape", "dtype", "expected", "axes"), ENCODER_DECODER)
def test_encoder_decoder(name, shape, dtype, expected, axes):
    sampler = Sampler(past=True, rows=2)
    argument = argument_of(name, encoder_decoder=True)
    assert sampler.sample(argument, torch.zeros(shape, dtype=dtype)) == Sample(expected, axes)


def test_a_batch_of_one_is_still_a_batch():
    sampler = Sampler(past=False, rows=1)
    ids = argument_of("input_ids", encoder_decoder=False)
    assert sampler.sample(ids, torch.zeros(1, 9, dtype=LONG)) == Sample((ROWS, QUERY), (B, S))


def test_the_axes_that_vary():
    assert Sample((3, 400, 1), (B, None, 1)).dynamic == (0, 1)


def test_plain_inputs_keep_their_sizes():
    assert plain_sample([torch.zeros(2, 7, 1)]) == (Sample((2, 7, 1), (B, None, 1)),)
    assert plain_sample([torch.zeros(())]) == (Sample((), ()),)


def test_plain_inputs_of_one_row():
    assert plain_sample([torch.zeros(1, 7), torch.zeros(1, 2)]) == (
        Sample((ROWS, 7), (B, None)),
        Sample((ROWS, 2), (B, None)),
    )


def test_one_row_beside_many_broadcasts():
    assert plain_sample([torch.zeros(4, 7), torch.zeros(1, 7)]) == (
        Sample((4, 7), (None, None)),
        Sample((1, 7), (1, None)),
    )
