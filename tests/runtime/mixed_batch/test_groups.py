import operator

import pytest
import torch

from peftc.runtime.mixed_batch.groups import Arranged, Way, groups_of

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
        (range(16), 16, 1, Way.LAID_OUT),  # as they lie
        (range(15, -1, -1), 16, 1, Way.GROUPED),
        (range(15, -1, -1), 16, 512, Way.LAID_OUT),  # what is moved is larger than what would be laid out
        ([1, 0, 0, 0], 2, 1, Way.GROUPED),
        ([1, 0, 0, 0], 2, 20, Way.LAID_OUT),
        ([0] * 15 + [1], 16, 1, Way.LAID_OUT),
        ([0, 1], 32, 1, Way.LAID_OUT),  # most adapters have no row
    ],
)
def test_what_takes_the_least_time(rows, seats, tokens, wanted):
    arranged = Arranged(list(rows), seats)
    assert arranged.way(tokens, 8, False) is wanted
    assert arranged.way(tokens, 8, True) is (Way.LAID_OUT if arranged.lies else Way.BY_SEAT)


def test_what_graphs_read_is_made_once():
    arranged = Arranged([1, 0, 1], 2)
    for way, groups, places in (
        (Way.LAID_OUT, [], []),
        (Way.GROUPED, [[1, 0], [0, 2]], [2, 0, 3]),
        (Way.BY_SEAT, 0, [1, 0, 1]),
    ):
        first = arranged.given(way, CPU)
        assert [each.tolist() for each in first] == [groups, places]
        assert all(map(operator.is_, first, arranged.given(way, CPU)))
    assert arranged.ids(CPU).tolist() == [1, 0, 1]
