import re
from pathlib import Path

import pytest

from peftc.grammar.elaborate import read_spec
from peftc.grammar.format import format_source
from peftc.grammar.source import Source

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
