import pytest
import torch

from peftc.compiler.trace.samples import PAST, QUERY, ROWS, SOURCE, Sample, Sampler, plain_sample

LONG = torch.long


def test_sizes_of_different_meaning_differ_and_are_neither_0_nor_1():
    sizes = [ROWS, QUERY, PAST, SOURCE, QUERY + PAST]
    assert len(set(sizes)) == len(sizes)
    assert min(sizes) > 1


DECODER = [
    ("input_ids", (2, 9), LONG, (ROWS, QUERY), (0, 1)),
    ("attention_mask", (2, 9), LONG, (ROWS, QUERY + PAST), (0, 1)),
    ("attention_mask", (2, 1, 9, 12), torch.float32, (ROWS, 1, QUERY, QUERY + PAST), (0, 2, 3)),
    ("position_ids", (2, 9), LONG, (ROWS, QUERY), (0, 1)),
    ("position_ids", (1, 9), LONG, (1, QUERY), (1,)),
    ("position_ids", (3, 2, 9), LONG, (3, ROWS, QUERY), (1, 2)),
    ("inputs_embeds", (2, 9, 16), torch.float32, (ROWS, QUERY, 16), (0, 1)),
    ("labels", (2, 9), LONG, (ROWS, QUERY), (0, 1)),
    ("labels", (2,), LONG, (ROWS,), (0,)),
    ("labels", (2, 4), torch.float32, (ROWS, 4), (0,)),
    ("cache_position", (9,), LONG, (QUERY,), (0,)),
    ("pixel_values", (2, 3, 8, 8), torch.float32, (ROWS, 3, 8, 8), (0,)),
    ("scale", (), torch.float32, (), ()),
]


@pytest.mark.parametrize(("name", "shape", "dtype", "expected", "dynamic"), DECODER)
def test_decoder(name, shape, dtype, expected, dynamic):
    sampler = Sampler(is_encoder_decoder=False, past=PAST, rows=2)
    assert sampler.sample(name, torch.zeros(shape, dtype=dtype)) == Sample(expected, dynamic)


ENCODER_DECODER = [
    ("input_ids", (2, 9), LONG, (ROWS, SOURCE), (0, 1)),
    ("attention_mask", (2, 9), LONG, (ROWS, SOURCE), (0, 1)),
    ("decoder_input_ids", (2, 4), LONG, (ROWS, QUERY), (0, 1)),
    ("decoder_attention_mask", (2, 4), LONG, (ROWS, QUERY + PAST), (0, 1)),
    ("encoder_outputs.last_hidden_state", (2, 9, 16), torch.float32, (ROWS, SOURCE, 16), (0, 1)),
]


@pytest.mark.parametrize(("name", "shape", "dtype", "expected", "dynamic"), ENCODER_DECODER)
def test_encoder_decoder(name, shape, dtype, expected, dynamic):
    sampler = Sampler(is_encoder_decoder=True, past=PAST, rows=2)
    assert sampler.sample(name, torch.zeros(shape, dtype=dtype)) == Sample(expected, dynamic)


def test_a_batch_of_one_is_still_a_batch():
    sampler = Sampler(is_encoder_decoder=False, past=0, rows=1)
    assert sampler.sample("input_ids", torch.zeros(1, 9, dtype=LONG)) == Sample((ROWS, QUERY), (0, 1))


def test_plain_inputs_keep_their_sizes():
    assert plain_sample([torch.zeros(2, 7, 1)]) == (Sample((2, 7, 1), (0, 1)),)
    assert plain_sample([torch.zeros(())]) == (Sample((), ()),)


def test_plain_inputs_of_one_row():
    assert plain_sample([torch.zeros(1, 7), torch.zeros(1, 2)]) == (
        Sample((ROWS, 7), (0, 1)),
        Sample((ROWS, 2), (0, 1)),
    )


def test_one_row_beside_many_broadcasts():
    assert plain_sample([torch.zeros(4, 7), torch.zeros(1, 7)]) == (Sample((4, 7), (0, 1)), Sample((1, 7), (1,)))
