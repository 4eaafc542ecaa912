import re
from pathlib import Path

import pytest

from peftc.grammar.algebra.functions import FUNCTIONS
from peftc.grammar.method.infer import DROP
from peftc.grammar.method.initialisers import INITIALISERS
from peftc.grammar.method.scalar import SCALAR_FUNCTIONS
from peftc.grammar.source import Source
from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.syntax import expression
from peftc.grammar.syntax.format import format_source

PAGE = Path(__file__).parents[2] / "docs" / "language.md"
BLOCKS = re.findall(
    r"^```(adapter|adapter-file)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def test_the_page_has_examples():
    assert len(BLOCKS) >= 12


@pytest.mark.parametrize(("kind", "text"), BLOCKS, ids=[str(number) for number in range(len(BLOCKS))])
def test_every_example_means_something(kind, text):
    assert format_source(Source("docs/language.md", text))
    if kind == "adapter":
        assert read_spec(text).adapters


# --- the tables ---


def calls(head: str) -> dict[str, list[str]]:
    """What stands in the first column of the table with this head: names, and what they take."""
    text = PAGE.read_text(encoding="utf-8")
    start = text.index(f"\n| {head} |") + 1
    rows = text[start:].partition("\n\n")[0].splitlines()[2:]
    written = [each for row in rows for each in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    found = [re.fullmatch(r"(\w+)(?:\((.*)\))?", each) for each in written]
    assert all(found), written
    return {each[1]: each[2].split(", ") if each[2] else [] for each in found if each}


def test_every_function_of_tensors_is_told_with_what_it_takes():
    told = calls("function")
    assert set(told) == {*FUNCTIONS, DROP}
    for name, function in FUNCTIONS.items():
        options = [option for option, _ in function.options]
        assert len(told[name]) == function.operands + len(options), name
        assert told[name][function.operands :] == options, name


def test_every_initialiser_is_told_with_its_arguments():
    told = calls("initialiser")
    for name, arguments in INITIALISERS.items():
        starts = {each: expression.text(expression.literal(default)) for each, default in arguments}
        wanted = [each if starts[each] == "none" else f"{each} = {starts[each].removesuffix('.0')}" for each in starts]
        assert told.pop(name) == wanted, name
    assert not told


def test_every_function_of_numbers_is_told():
    assert set(calls("function of numbers")) == set(SCALAR_FUNCTIONS)
