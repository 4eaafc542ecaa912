"""The page counts every test once, and says why it did not pass."""

import re

from tests.peft_suite.page import KINDS, PAGE, page, reason, reasons

KNOWN = (
    {"kind": "internals", "why": "reads layers", "error": "^AttributeError$", "message": "lora_A"},
    {"kind": "words", "why": "other words", "message": "Regex pattern"},
)


def row(test, outcome="failed", **more):
    return {"test": f"peft_tests/{test}", "outcome": outcome, **more}


def test_the_first_reason_that_fits():
    assert reason(row("a", error="AttributeError", message="no lora_A"), KNOWN) == ("internals", "reads layers")
    assert reason(row("a", error="AttributeError", message="no lora_X"), KNOWN)[0] == "fails"
    assert reason(row("a", error="AssertionError", message="Regex pattern"), KNOWN) == ("words", "other words")
    assert reason(row("a", error="KeyError", message="x\n y"), KNOWN) == ("fails", "KeyError: x y")


def test_what_is_not_known_fails():
    assert (
        reason(row("a", error="AssertionError", message="assert False", line="t.py: assert allclose(a, b)"))[0]
        == "fails"
    )


def test_reasons_are_of_a_kind_and_are_read():
    for each in reasons():
        assert each["kind"] in KINDS.keys() - {"fails"}
        assert each.keys() <= {"kind", "why", "test", "error", "message", "line"}
        patterns = [pattern for name, pattern in each.items() if name not in ("kind", "why")]
        assert patterns, "a reason that fits everything"
        for pattern in patterns:
            assert not re.search(pattern, ""), pattern


def test_the_table():
    theirs = [row(f"test_x.py::test_a[{n}]", "passed") for n in range(4)] + [row("test_x.py::test_b")]
    ours = [row("test_x.py::test_a[0]", "passed"), row("test_x.py::test_b", "passed")]
    ours += [row("test_x.py::test_a[1]", error="AttributeError", message="'Linear' object has no attribute 'lora_A'")]
    ours += [row("test_x.py::test_a[2]", error="KeyError", message="?", line="")]
    text = page(theirs, ours, "A note.")
    assert "| `test_x.py` | 1 | 1 | 0 | 0 | 0 | 1 | 50.0% |\n" in text
    assert "A note." in text
    assert "- KeyError: ?: `test_a` (1)\n" in text


def test_the_page_is_of_this_text():
    written = PAGE.read_text()
    head = page([], [])
    assert written.startswith(head[: head.index("| file")])
    assert all(f"## {title[0].upper()}{title[1:]}\n" in written for title in KINDS.values())
