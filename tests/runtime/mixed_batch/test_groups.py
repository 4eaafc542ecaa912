import pytest
import torch

from peftc.runtime.mixed_batch.groups import groups_of, is_cheaper

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [0, 0, 0, 2], [1, 1, 0, 1, 2, 0], [3]])
def test_each_row_is_found_where_its_adapter_is(rows):
    seats = 4
    groups, places = groups_of(rows, seats, CPU)
    assert groups.shape == (seats, max(map(rows.count, rows)))
    assert groups.flatten()[places].tolist() == list(range(len(rows)))
    assert [int(place) // groups.shape[1] for place in places] == rows


@pytest.mark.parametrize(
    ("rows", "seats", "tokens", "wanted"),
    [
        (range(16), 16, 1, True),
        (range(16), 16, 512, True),  # nothing fills up
        ([0, 0, 1, 1], 2, 512, True),
        ([0, 0, 0, 1], 2, 1, True),
        ([0, 0, 0, 1], 2, 512, False),
        ([0] * 15 + [1], 16, 1, False),
        ([0, 1], 32, 1, False),  # most adapters have no row
    ],
)
def test_what_is_cheaper(rows, seats, tokens, wanted):
    assert is_cheaper(list(rows), seats, tokens) is wanted
