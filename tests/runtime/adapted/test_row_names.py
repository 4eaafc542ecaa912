import pytest
import torch

from peftc.grammar.diagnostics import UsageError
from peftc.runtime.adapted.row_names import Row, named, rows_with, with_tasks

A, B = (("a", 1.0),), (("b", 1.0),)
COUNTS = {A: 3, B: 0, (): 0}


def test_names():
    given = ["a", "__base__", ("b", "a"), {"a": 0.5, "b": 2}]
    assert named(given, ()) == (A, (), (*B, *A), (("a", 0.5), ("b", 2.0)))
    assert named(torch.tensor([1, -1, 0]), ("a", "b")) == (B, (), A)


@pytest.mark.parametrize(
    "given", ["a", {"a": 1.0}, 3, [3], torch.tensor([2]), torch.tensor([0.5]), torch.tensor([[0]])]
)
def test_names_that_are_none(given):
    with pytest.raises(UsageError, match="E529"):
        named(given, ("a", "b"))


def test_each_row_has_its_task_where_its_adapters_have_some():
    found = with_tasks((A, B, (), A), COUNTS, [2, 9, -1, 0])
    assert found == (Row(A, 2), Row(B), Row(()), Row(A, 0))
    assert with_tasks((A, A), COUNTS, torch.tensor([1])) == (Row(A, 1), Row(A, 1))
    assert with_tasks((B, ()), {B: 0, (): 0}, None) == (Row(B), Row(()))


@pytest.mark.parametrize(
    ("rows", "tasks", "message"),
    [
        ((A, B), None, "are not given"),
        ((A, B), [3, 0], "there is no task 3: those of a are numbered from 0 to 2"),
        ((A, A), [0, 1, 2], "3 tasks were given for 2 rows"),
        ((A,), [[0]], "a whole number for each row"),
        ((A,), [True], "a whole number for each row"),
        ((A,), "first", "a whole number for each row"),
    ],
)
def test_tasks_that_do_not_fit(rows, tasks, message):
    with pytest.raises(UsageError, match="E563") as caught:
        with_tasks(rows, COUNTS, tasks)
    assert message in str(caught.value)


def test_tasks_for_nobody():
    with pytest.raises(UsageError, match="no active adapter has tasks"):
        with_tasks((B, ()), {B: 0, (): 0}, [0, 0])


def test_how_many_rows_there_are():
    assert rows_with([0, 1], None) == 2
    assert rows_with([0], 5) == 5
    assert rows_with(None, None) == 1
