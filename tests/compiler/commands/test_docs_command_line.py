import re
import shlex
from pathlib import Path

import pytest

from peftc.compiler.commands.cli import EPILOG
from tests.compiler.commands.cli_help import peftc

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (?:echo '(.*)' \| )?peftc (.*)\n((?:[^$`].*\n)*)", PAGE, re.MULTILINE)
CHEAP = [each for each in COMMANDS if each[1].startswith(("check", "fmt"))]


def test_the_page_has_examples():
    assert len(COMMANDS) >= 6
    assert len(CHEAP) >= 3


@pytest.mark.parametrize(("stdin", "line", "shown"), CHEAP, ids=[each[1] for each in CHEAP])
def test_examples_are_true(stdin, line, shown, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = peftc(*shlex.split(line), stdin=stdin or None)
    assert done.code == 0
    if shown:
        assert done.out == shown


@pytest.mark.parametrize(
    "command",
    [
        "compile",
        "check",
        "explain",
        "fmt",
        "graph",
        "drift",
        "export",
        "run",
        "bench",
        "inspect",
        "decompile",
        "methods",
        "doctor",
    ],
)
def test_every_option_in_a_synopsis_exists(command):
    synopsis = re.search(rf"^`peftc {command} (.*)`$", PAGE, re.MULTILINE)
    assert synopsis is not None
    options = peftc(command, "--help").out
    for option in re.findall(r"(?<!\w)--?[a-z-]+", synopsis.group(1)):
        assert option in options, option


def test_the_exit_codes_are_those_of_the_help():
    documented = re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)
    assert documented == ["0", "1", "2", "3", "70", "130", "143", "141"]
    assert set(documented) == set(re.findall(r"(?<=[:.,] )\d+", EPILOG.replace("\n", " ")))
