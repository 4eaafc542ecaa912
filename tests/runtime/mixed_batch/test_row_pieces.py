import pytest
import torch
from torch import fx, nn

from peftc.grammar.diagnostics import UsageError
from peftc.passes.route.group_rows import GROUPS, PLACES
from peftc.passes.route.route_rows import IDS, LanePieces, Piece
from peftc.runtime.mixed_batch.batch import Assigned, Chosen, MixedBatch
from peftc.runtime.mixed_batch.row_pieces import Lane, RowPieces

SLOT = "slots.p0__site"
FORMS = ("own", "matrix", "tables")
LOW, WIDE, OTHER = (Chosen([], None) for _ in range(3))


class Values:
    """The values of a lane by choice, and how often each was computed."""

    def __init__(self):
        self.tensors = {LOW: torch.randn(2, 4), WIDE: torch.randn(3, 4)}
        self.asked = []

    def compute(self, chosen):
        self.asked.append(chosen)
        return (self.tensors[chosen],)


def made(*rows, form="own", members=(), everyone=False, room=()):
    batch, values = MixedBatch(), Values()
    batch.has = lambda chosen, slots: chosen in values.tensors
    batch.room = room
    batch.assigned = Assigned(rows)
    lane = LanePieces(frozenset({SLOT}), fx.Graph(), (Piece("p0", 0, form, torch.float32),), members)
    pieces = RowPieces(batch, [Lane(lane, lane.slots, values.compute, everyone)], nn.Linear(1, 1))
    pieces.refresh()
    return batch, pieces, values


@pytest.mark.parametrize("form", FORMS)
def test_laid_out(form):
    """What is smaller ends in zeros; a row without the lane has zeros alone."""
    _, pieces, values = made(WIDE, None, LOW, WIDE, OTHER, form=form)
    low, zero = torch.cat([values.tensors[LOW], torch.zeros(1, 4)]), torch.zeros(3, 4)
    wide = values.tensors[WIDE]
    wanted = {
        "own": torch.stack([wide, zero, low, wide, zero]),
        "matrix": torch.stack([wide.T, zero.T, low.T, wide.T, zero.T]),
        "tables": torch.stack([wide, zero, low, zero]),
    }
    assert torch.equal(pieces.values["p0"], wanted[form])
    assert pieces.values["p0"].is_contiguous()
    assert pieces.values[IDS].tolist() == [0, 1, 2, 0, 3]


def test_numbers_are_chosen_as_tensors_are():
    """A scale that meets what no weight follows is one number for each row."""
    batch, values = MixedBatch(), Values()
    values.tensors = {LOW: torch.tensor(2.0), WIDE: torch.tensor(3.0)}
    batch.has = lambda chosen, slots: chosen in values.tensors
    lane = LanePieces(frozenset({SLOT}), fx.Graph(), (Piece("p0", 0, "own", torch.float32),))
    pieces = RowPieces(batch, [Lane(lane, lane.slots, values.compute, False)], nn.Linear(1, 1))
    for rows, wanted in (((LOW, None, WIDE), [2.0, 0.0, 3.0]), ((WIDE, LOW, None, LOW), [3.0, 2.0, 0.0, 2.0])):
        batch.assigned = Assigned(rows)
        pieces.refresh()
        assert pieces.values["p0"].tolist() == wanted


def test_where_rows_are_told_apart_the_others_have_what_one_has():
    _, pieces, values = made(LOW, None, LOW, members=("p1",))
    assert torch.equal(pieces.values["p0"][1], values.tensors[LOW])
    assert pieces.values["p1"].tolist() == [True, False, True]


@pytest.mark.parametrize("graded", [False, True])
def test_nothing_is_computed_twice(graded):
    with torch.set_grad_enabled(graded):
        _nothing_is_computed_twice(*made(LOW, None, WIDE))


def _nothing_is_computed_twice(batch, pieces, values):
    kept = pieces.values["p0"]
    pieces.refresh()
    assert pieces.values["p0"] is kept
    batch.assigned = Assigned((WIDE, WIDE, LOW))
    pieces.refresh()
    assert torch.equal(pieces.values["p0"][0], values.tensors[WIDE])
    assert values.asked == [LOW, WIDE]
    batch.contents, seen = object(), {LOW: object(), WIDE: None}
    batch.content = seen.get  # of one choice alone a tensor was written to
    pieces.refresh()
    assert values.asked == [LOW, WIDE, LOW]


def test_who_comes_takes_the_seat_of_who_left():
    """And only its values are computed."""
    batch, pieces, values = made(WIDE, None, WIDE)
    batch.assigned = Assigned((None, LOW, LOW))
    with torch.no_grad():
        pieces.refresh()
    low = torch.cat([values.tensors[LOW], torch.zeros(1, 4)])
    assert torch.equal(pieces.values["p0"], torch.stack([torch.zeros(3, 4), low, low]))
    assert values.asked == [WIDE, LOW]
    batch.assigned = Assigned((None, LOW, WIDE))
    with torch.no_grad():
        pieces.refresh()
    assert torch.equal(pieces.values["p0"][1:], torch.stack([low, values.tensors[WIDE]]))


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_only_rows_that_change_are_copied(form):
    batch, pieces, values = made(WIDE, LOW, LOW, None, form=form)
    before = pieces.values["p0"]
    if form != "tables":
        before[1].fill_(7.0)  # is seen to stay
    batch.assigned = Assigned((WIDE, LOW, WIDE, None))
    pieces.refresh()
    got = pieces.values["p0"]
    assert got is before
    assert pieces.values[IDS].tolist() == [0, 1, 0, 2]
    if form != "tables":
        wide = values.tensors[WIDE] if form == "own" else values.tensors[WIDE].T
        assert torch.equal(got[2], wide)
        assert torch.equal(got[0], wide)
        assert (got[1] == 7.0).all()
        assert (got[3] == 0.0).all()


@pytest.mark.parametrize("graded", [False, True])
def test_rows_that_come_and_go(graded):
    """Whatever came before, graphs read what they would read of a new layout."""
    generator = torch.Generator().manual_seed(0)
    batch, pieces, values = made(WIDE, LOW, None, LOW)
    for step in range(60):
        picked = torch.randint(0, 4, (4,), generator=generator).tolist()
        rows = list(batch.rows) if step % 5 else [WIDE, LOW, None, LOW]
        rows[picked[0]] = (WIDE, LOW, None, OTHER)[picked[1]]
        if picked[2] == 0:  # one of them is written to
            values.tensors[LOW] = values.tensors[LOW] + 1
            batch.contents = object()
            batch.content = lambda chosen: None if chosen is None else values.tensors.get(chosen)
        batch.assigned = Assigned(tuple(rows))
        with torch.set_grad_enabled(graded):
            pieces.refresh()
        for row, each in enumerate(rows):
            wanted = torch.zeros(pieces.values["p0"].shape[1:])
            if each in values.tensors:
                wanted[: len(values.tensors[each])] = values.tensors[each]
            assert torch.equal(pieces.values["p0"][row], wanted), step


def test_what_is_too_large_for_its_seat_is_given_room():
    batch, pieces, values = made(LOW, None)
    batch.assigned = Assigned((WIDE, None))
    pieces.refresh()
    assert torch.equal(pieces.values["p0"], torch.stack([values.tensors[WIDE], torch.zeros(3, 4)]))


def test_what_a_backward_pass_reads_is_not_written_to():
    batch, pieces, _ = made(LOW, None, WIDE)
    x = torch.ones(3, 3, 4, requires_grad=True)
    product = (x * pieces.values["p0"]).sum()
    before = pieces.values["p0"].clone()
    with torch.no_grad():
        for rows in ((OTHER, None, WIDE), (WIDE, WIDE, OTHER), (LOW, LOW, None)):
            batch.assigned = Assigned(rows)
            pieces.refresh()
    product.backward()
    assert torch.equal(x.grad, before)


def grouping(*rows):
    """As `made`, where graphs take the matrix of `p0` as it lies."""
    batch, values = MixedBatch(), Values()
    batch.has = lambda chosen, slots: chosen in values.tensors
    lane = LanePieces(frozenset({SLOT}), fx.Graph(), (Piece("p0", 0, "matrix", torch.float32),))
    pieces = RowPieces(batch, [Lane(lane, lane.slots, values.compute, False)], nn.Linear(1, 1), frozenset({"p0"}))
    batch.assigned = Assigned(rows)
    return batch, pieces, values


def seen_by_rows(pieces, rows):
    """The matrix that each row meets, however they lie."""
    groups, places, matrix = (pieces.values[name] for name in (GROUPS, PLACES, "p0"))
    if groups.dim() == 1:
        return list(matrix)
    most = groups.shape[1]
    assert groups.flatten()[places].tolist() == list(range(len(rows)))
    return [matrix[int(place) // most] for place in places]


def of(values, each):
    wanted = torch.zeros(3, 4)
    if each in values.tensors:
        wanted[: len(values.tensors[each])] = values.tensors[each]
    return wanted.T


def test_until_rows_stay_their_matrices_are_read_as_they_lie():
    rows = (WIDE, LOW, None, LOW)
    _batch, pieces, values = grouping(*rows)
    with torch.no_grad():
        for call in range(4):
            pieces.check([torch.zeros(4, 1, 4)])
            pieces.refresh()
            assert (pieces.values[GROUPS].dim() == 2) is (call < 2)
            if call < 2:
                assert pieces.values["p0"] is pieces._sitting["p0"]
            for got, each in zip(seen_by_rows(pieces, rows), rows, strict=True):
                assert torch.equal(got, of(values, each))
    assert values.asked == [WIDE, LOW]


def test_a_call_of_more_tokens_has_them_by_row():
    _batch, pieces, _values = grouping(WIDE, LOW, None, LOW)
    with torch.no_grad():
        for tokens, groups in ((1, 2), (500, 1), (1, 1)):
            pieces.check([torch.zeros(4, tokens, 4)])
            pieces.refresh()
            assert pieces.values[GROUPS].dim() == groups


@pytest.mark.parametrize("graded", [False, True])
def test_rows_come_and_go_and_stay_a_while(graded):
    """Grouped, by row and with some exchanged, in any order, rows have what is theirs."""
    generator = torch.Generator().manual_seed(1)
    batch, pieces, values = grouping(WIDE, LOW, None, LOW)
    forms, held = set(), []
    for step in range(120):
        picked = torch.randint(0, 4, (4,), generator=generator).tolist()
        rows = list(batch.rows)
        if picked[2] < 3:
            rows[picked[0]] = (WIDE, LOW, None, OTHER)[picked[1]]
        if picked[2] == 0:
            values.tensors[LOW] = values.tensors[LOW] + 1
            batch.contents = object()
            batch.content = lambda chosen: None if chosen is None else values.tensors.get(chosen)
        batch.assigned = Assigned(tuple(rows))
        with torch.set_grad_enabled(graded):
            pieces.check([torch.zeros(4, 400 if picked[3] == 0 else 1, 4)])
            pieces.refresh()
        forms.add(pieces.values[GROUPS].dim())
        for got, each in zip(seen_by_rows(pieces, rows), rows, strict=True):
            assert torch.equal(got, of(values, each)), step
        if graded:  # a backward pass may come for what was read
            held.append((pieces.values["p0"], pieces.values["p0"].clone()))
    assert forms == {1, 2}
    assert all(torch.equal(now, then) for now, then in held)


def test_gradients_where_matrices_are_read_as_they_lie():
    batch, pieces, values = grouping(LOW, WIDE, LOW, WIDE)
    for each in values.tensors.values():
        each.requires_grad_(True)
    batch._trains = True
    pieces.check([torch.zeros(4, 1, 4)])
    pieces.refresh()
    assert pieces.values[GROUPS].dim() == 2
    sum((row + 1) * each.sum() for row, each in enumerate(seen_by_rows(pieces, batch.rows))).backward()
    assert torch.equal(values.tensors[LOW].grad, torch.full((2, 4), 4.0))
    assert torch.equal(values.tensors[WIDE].grad, torch.full((3, 4), 6.0))


def test_room_is_kept_for_the_largest():
    _, pieces, _ = made(LOW, None, room=(LOW, WIDE))
    assert pieces.values["p0"].shape == (2, 3, 4)


def test_nobody_present_has_the_lane():
    _, pieces, _ = made(None, OTHER, room=(WIDE,), members=("p1",))
    assert not pieces.values["p0"].any()
    assert pieces.values["p1"].tolist() == [False, False]


def test_gradients_go_to_each_by_its_rows():
    batch, pieces, values = made(LOW, None, WIDE, LOW)
    for each in values.tensors.values():
        each.requires_grad_(True)
    batch._trains = True
    pieces.refresh()
    pieces.values["p0"].sum().backward()
    assert torch.equal(values.tensors[LOW].grad, torch.full((2, 4), 2.0))
    assert torch.equal(values.tensors[WIDE].grad, torch.ones(3, 4))
    before = pieces.values["p0"]
    pieces.refresh()  # a graph is for one backward
    assert pieces.values["p0"] is not before


@pytest.mark.parametrize(
    "tensors",
    [[torch.zeros(2, 5, 4)], [torch.zeros(4, dtype=torch.long), torch.zeros(3, 4)], []],
    ids=["few", "other", "none"],
)
def test_another_number_of_rows_is_refused(tensors):
    _, pieces, _ = made(LOW, None, WIDE, LOW)
    pieces.check([torch.zeros(4, 5, 4)])
    pieces.check([torch.zeros(4, 5, dtype=torch.long)])
    with pytest.raises(UsageError, match=r"E529.*4 rows"):
        pieces.check(tensors)


@torch.no_grad()
def test_matrices_lie_as_most_calls_have_them_best():
    """Along the longer axis where tokens are few; along the last one when calls have had many for a while."""
    batch, pieces, values = grouping(WIDE, LOW, WIDE, LOW)
    along_last = []
    for tokens in (1, 1, 1, 50, 1, 50, 50, 50, 50, 1, 1, 1, 1):
        pieces.check([torch.zeros(4, tokens, 4)])
        pieces.refresh()
        along_last.append(pieces.values["p0"].is_contiguous())
        for got, each in zip(seen_by_rows(pieces, batch.rows), batch.rows, strict=True):
            assert torch.equal(got, of(values, each))
    assert along_last == [False] * 7 + [True] * 4 + [False] * 2
