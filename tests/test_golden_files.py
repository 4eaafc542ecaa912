"""The files of texts, as tests use them: sections are found, compared, written in order and cleared."""

import pytest

from tests.golden_files import Golden


def test_sections_are_read_back_as_they_were_written(tmp_path):
    texts = {"second": "two\n\n", "first": "one\n", "third": "  three\n=> 3\n\nof them\n"}
    for name, text in texts.items():
        Golden(update=True, root=tmp_path)("all.txt", text, name)
    for name, text in texts.items():
        Golden(update=False, root=tmp_path)("all.txt", text, name)
    heads = [line for line in (tmp_path / "all.txt").read_text().splitlines() if line.startswith("=== ")]
    assert heads == ["=== first", "=== second", "=== third"]


@pytest.mark.parametrize(("text", "section"), [("one", "first"), ("one\n\n", "first"), ("one\n", "none")])
def test_another_text_and_a_missing_section_are_noticed(tmp_path, text, section):
    Golden(update=True, root=tmp_path)("all.txt", "one\n", "first")
    Golden(update=False, root=tmp_path)("all.txt", "one\n", "first")
    with pytest.raises(AssertionError):
        Golden(update=False, root=tmp_path)("all.txt", text, section)


def test_a_text_that_would_end_its_section_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="head of a section"):
        Golden(update=True, root=tmp_path)("all.txt", "one\n=== two\n", "first")


def test_what_no_test_writes_is_noticed_and_cleared(tmp_path):
    writes, reads = (Golden(update=update, root=tmp_path) for update in (True, False))
    for name in ("first", "second"):
        writes("all.txt", "text\n", name)
    reads.holds("all.txt", {"first", "second"})
    with pytest.raises(AssertionError):
        reads.holds("all.txt", {"first"})
    writes.holds("all.txt", {"first"})
    reads.holds("all.txt", {"first"})


def test_a_whole_file_and_a_missing_one(tmp_path):
    Golden(update=True, root=tmp_path)("deep/whole.txt", "text")
    Golden(update=False, root=tmp_path)("deep/whole.txt", "text")
    for path, text in (("deep/whole.txt", "text\n"), ("missing.txt", "text")):
        with pytest.raises(AssertionError):
            Golden(update=False, root=tmp_path)(path, text)
