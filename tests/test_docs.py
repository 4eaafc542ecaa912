"""What README.md and the tutorial say is run, in order, where a reader would run it.

In ```console blocks, lines beginning with `$ ` are commands and the others what they print; `...` stands for anything.
A command is to fail if an `error[` is shown for it, and to succeed otherwise. ```python blocks of one page share their
names. An ```adapter block whose first line is `# NAME.adapter` is that file.
"""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from peftc.compiler.commands import cli
from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.spec.library import builtin_methods

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/tutorial.md",
    "docs/quantized.md",
    "docs/export.md",
    "docs/from-peft.md",
    "docs/many-adapters.md",
    "docs/own-method.md",
    "docs/own-scheme.md",
    "docs/how-it-works.md",
    "CONTRIBUTING.md",
)

# Installing and running the tests from the tests would go in circles; `.ci/run` runs these.
EXEMPT = ("python3 -m venv ", ".venv/bin/", ".ci/", "MYPY=", "git ")


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    text: str
    shown: tuple[str, ...]

    @property
    def fails(self) -> bool:
        return any("error[" in line for line in self.shown)


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(each[1], each[2], text.count("\n", 0, each.start(2)) + 1) for each in found]


def commands(block: Block) -> Iterator[Command]:
    shown: list[str] = []
    command = ""
    for line in block.text.splitlines():
        if line.startswith("$ "):
            if command:
                yield Command(command, tuple(shown))
            command, shown = line[2:], []
        else:
            assert command, f"line {block.line}: output before a command"
            shown.append(line)
    yield Command(command, tuple(shown))


def is_printed(shown: tuple[str, ...], printed: str) -> bool:
    """Whether the lines shown are what was printed, whatever the space between words; `...` is anything."""
    text = "\n".join(" ".join(line.split()) for line in shown)
    pattern = ".*".join(re.escape(part.strip()) for part in text.split("..."))
    return re.search(pattern, "\n".join(" ".join(line.split()) for line in printed.splitlines()), re.DOTALL) is not None


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_what_the_page_says_is_so(page, workshop, monkeypatch, capfd):
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        where = f"{page}:{block.line}"
        if block.kind == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), names)
        elif block.kind == "adapter":
            name = re.match(r"# ([\w-]+\.adapter)\n", block.text)
            if not (name and name[1] == "broken.adapter"):
                assert read_spec(block.text).adapters, where
            if name:
                (workshop / name[1]).write_text(block.text, encoding="utf-8")
        elif block.kind == "console":
            for command in commands(block):
                if not command.text.startswith(EXEMPT):
                    run(command, where, monkeypatch, capfd)


def run(command, where, monkeypatch, capfd):
    capfd.readouterr()
    words = shlex.split(command.text)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    if words[0] == "peftc":
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            raise SystemExit(cli.main())
        code = ended.value.code or 0
    else:
        assert words[0] in ("python", "dot"), f"{where}: {command.text} is not a command a page may show"
        words[0] = sys.executable if words[0] == "python" else words[0]
        code = subprocess.run(words, check=False).returncode
    printed = "".join(capfd.readouterr())
    assert (code != 0) == command.fails, f"{where}: $ {command.text} ended with {code}\n{printed}"
    assert is_printed(command.shown, printed), f"{where}: $ {command.text} printed\n{printed}"


# --- the pages hold together ---

EVERY_PAGE = sorted(page.relative_to(ROOT).as_posix() for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "#")):
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), f"{page} links to {target}"


def test_the_readme_shows_a_real_message(workshop, monkeypatch, capfd):
    spec = next(each.text for each in blocks("README.md") if each.kind == "adapter")
    message = next(each.text for each in blocks("README.md") if each.kind == "text")
    (workshop / "support.adapter").write_text(spec.replace("q_proj", "q_porj"), encoding="utf-8")
    command = Command("peftc check support.adapter examples/tiny-llama", tuple(message.splitlines()))
    run(command, "README.md", monkeypatch, capfd)


def test_the_readme_names_every_method():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (paragraph,) = re.findall(r"The methods of PEFT, each a file of the language: (.*?)\. They", text, re.DOTALL)
    assert re.findall(r"`(\w+)`", paragraph) == list(builtin_methods())


def test_the_api_reference_is_new():
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    assert made == (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), "run python docs/make_api.py"


def test_every_pass_is_explained():
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    found = set()
    for file in (ROOT / "passes").rglob("*.py"):
        found |= set(re.findall(r'name: ClassVar\[str\] = "([\w-]+)"', file.read_text(encoding="utf-8")))
    assert len(found) >= 4
    assert {name for name in found if f"| `{name}` |" not in page} == set()


def test_the_readme_has_the_two_commands_that_ci_runs():
    lines = [command.text for block in blocks("README.md") if block.kind == "console" for command in commands(block)]
    installs = [line for line in lines if line.startswith("python3 -m venv .venv && .venv/bin/pip install ")]
    assert len(installs) == 2
    assert "&& .venv/bin/peftc compile examples/quickstart.adapter examples/tiny-llama " in installs[0]
    assert "&& .venv/bin/python -m pytest" in installs[1]
    assert f"$ {installs[1]}" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script
    assert "pip install" not in script


@pytest.mark.parametrize(
    ("shown", "printed", "so"),
    [
        (("a  b",), "a b\nc", True),
        (("a", "...", "d"), "a\nb\nc\nd", True),
        (("a ... c",), "a (b) c", True),
        (("b",), "a\nc", False),
        (("a", "d"), "a\nb\nd", False),
    ],
)
def test_what_counts_as_printed(shown, printed, so):
    assert is_printed(shown, printed) is so
