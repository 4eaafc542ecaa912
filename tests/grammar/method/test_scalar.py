"""Scalar functions, against what they are said to be."""

import pytest

from peftc.grammar.diagnostics import SpecError
from peftc.grammar.method.bind import Place, bind
from peftc.grammar.method.check import check_method
from peftc.grammar.method.scalar import evaluate
from peftc.grammar.source import Source
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.parse import parse


def called(function: str, *arguments: float) -> object:
    given = tuple(tree.Argument(None, tree.Number(each)) for each in arguments)
    return evaluate(tree.Call(function, given), {})


@pytest.mark.parametrize("number", [1, 2, 12, 30, 97])
@pytest.mark.parametrize("wanted", [1, 4, 5, 11, 100])
def test_nearest_divisor(number: int, wanted: int) -> None:
    found = called("nearest_divisor", number, wanted)
    distances = {abs(each - wanted): each for each in range(number, 0, -1) if number % each == 0}
    assert found == distances[min(distances)]


def test_of_two_divisors_as_near_the_smaller_is_taken() -> None:
    assert called("nearest_divisor", 12, 5) == 4
    assert called("nearest_divisor", 48, 7) == 6


def test_none_is_compared() -> None:
    test = tree.Binary("==", tree.Name("x"), tree.Null())
    assert evaluate(test, {"x": None}) is True
    assert evaluate(test, {"x": 0}) is False


@pytest.mark.parametrize(
    ("number", "limit", "found"), [(48, 7, 6), (48, 100, 48), (48, 6.9, 6), (7, 6, 1), (7, 0, 1), (7, -3, 1)]
)
def test_largest_divisor(number: int, limit: float, found: int) -> None:
    assert called("largest_divisor", number, limit) == found


@pytest.mark.parametrize("function", ["nearest_divisor", "largest_divisor"])
def test_divisors_are_not_looked_for_all_day(function: str) -> None:
    assert called(function, 2**40, 3) == 2
    with pytest.raises(SpecError) as caught:
        called(function, 2**62 + 1, 3)
    assert caught.value.diagnostics[0].code == "E213"


def test_whole_numbers_of_others() -> None:
    assert [called("floor", each) for each in (3.5, -0.5, 2)] == [3, -1, 2]
    assert [called("round", each) for each in (2.5, 2.6, -1.2)] == [2, 3, -1]


def test_what_is_rounded_can_be_a_size() -> None:
    source = 'method m() { on linear param A[floor(sqrt(out)), in] = zeros saved "A" '
    source += "W' = W + tile(A, [out // 2, 1]) }"
    (rule,) = parse(Source("m", source)).statements
    assert isinstance(rule, tree.Method)
    assert bind(check_method(rule), (), Place("linear", 4, 6)).params[0].shape == (2, 6)


LISTS = {"len(x)": 3, "max(x)": 5, "min(x)": -2, "x == [5, -2, 0]": True, "len([])": 0, "max(2, 3)": 3}


@pytest.mark.parametrize("text", LISTS)
def test_lists(text: str) -> None:
    (method,) = parse(Source("x", f"method m() {{ on linear let it = {text} }}")).statements
    assert isinstance(method, tree.Method)
    (_, item) = method.items
    assert isinstance(item, tree.LetItem)
    assert evaluate(item.value, {"x": (5, -2, 0)}) == LISTS[text]


def test_of_an_empty_list_there_is_no_largest() -> None:
    with pytest.raises(SpecError) as caught:
        evaluate(tree.Call("max", (tree.Argument(None, tree.Name("x")),)), {"x": ()})
    assert caught.value.diagnostics[0].code == "E213"
