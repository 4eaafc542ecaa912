"""docs/models.md says of itself what is so: its counts are those of its lists, and it is made of rows."""

import re

from tests.sweep.page import PAGE, SAID, page

ROWS = [
    {"family": "causal", "name": name, "plain": plain, "peft": peft, "ours": ours, "left": {}, "split": {}}
    for name, plain, peft, ours in (
        ("one", "", "", {}),
        ("two", "", "", {"merge": "it is off"}),
        ("three", "", "no", {}),
        ("four", "no", "", {}),
        ("five", "", "", {"forward": "not run"}),
    )
]


def test_a_page_counts_its_rows() -> None:
    assert "| causal | 5 | 4 | 3 | 2 | 1 |" in page(ROWS, "")
    assert "| `two` | merge | it is off |" in page(ROWS, "")


def test_the_counts_of_the_page_are_those_of_its_lists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = {
        family: tuple(map(int, numbers.split("|")))
        for family, numbers in re.findall(r"^\| ([\w-]+) \| (\d+(?: \| \d+){4}) \|$", text, re.M)
    }
    parts = re.split(r"^### ", text.partition("## Every type")[2], flags=re.M)[1:]
    assert [part.split()[0] for part in parts] == list(table)
    for part in parts:
        works, differs, left = (_listed(part, each) for each in SAID.values())
        failing = len(re.findall(r"^\| `[^`]+` \| peft fails \|", part, re.M))
        undriven = len(re.findall(r"^\| `[^`]+` \| not driven \|", part, re.M))
        driven = works + differs + left + failing
        assert table[part.split()[0]] == (driven + undriven, driven, driven - failing, works + differs, works)
    total = re.search(r"^\| \*\*all\*\* \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.M)
    assert total is not None
    assert tuple(map(int, total.groups())) == tuple(map(sum, zip(*table.values(), strict=True)))


def _listed(part: str, what: str) -> int:
    """How many names are said to work or differ; their number is said too."""
    found = re.search(rf"^{what} \((\d+)\): (.*)\.$", part, re.M)
    if found is None:
        return 0
    names = found[2].split(", ")
    assert len(names) == int(found[1])
    return len(names)
