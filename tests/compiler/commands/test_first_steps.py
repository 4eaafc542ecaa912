"""What somebody sees who has just installed peftc: no notices of other libraries, pictures, completion."""

import os
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from peftc import compiler
from tests.compiler.commands.cli_help import peftc

ROOT = Path(__file__).parents[3]
OPTIONAL = ("torchao", "hqq", "bitsandbytes", "timm", "peft", "onnx", "diffusers", "gguf", "trl")


def alone(*arguments, code="import sys\nfrom peftc.compiler.commands.cli import main\nmain()", **environment):
    """The command in a process of its own, as a shell runs it."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


def test_what_libraries_log_stays_off_the_screen():
    done = alone("check", "examples/quickstart.adapter", "examples/tiny-llama")
    assert (done.returncode, done.stderr) == (0, "")


WATCH = f"""
import sys
from peftc.compiler.commands.cli import main
try:
    main()
finally:
    print(sorted({set(OPTIONAL) | {"torch", "transformers"}!r} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "check examples/quickstart.adapter",
        "methods lora",
        "explain E201",
        "fmt --check examples/prefix.adapter",
    ],
)
def test_what_needs_no_model_imports_neither_torch_nor_an_optional_library(line):
    done = alone(*line.split(), code=WATCH)
    assert done.stderr.strip().endswith("[]"), done.stderr


def test_what_reads_a_checkpoint_alone_imports_no_optional_library(place):
    base = nn.Sequential(nn.Linear(4, 4))
    compiler.apply(base, "adapter default = lora(rank = 2) { on 0 }").save_pretrained("saved")
    for command in ("inspect", "decompile"):
        done = alone(command, place / "saved", code=WATCH)
        assert done.returncode == 0
        assert not [each for each in OPTIONAL if repr(each) in done.stderr.splitlines()[-1]], done.stderr


# --- the exporter's graphs ---


class Branch(nn.Module):
    """Its forward depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        return x + 1 if x.sum() > 0 else x


class Rows(Branch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        rows = (x > 0).nonzero()
        return x[rows[:, 0]][: int(rows.shape[0] // 2)]


class Count(Branch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(int(self.fc(x).abs().sum().item()))


@pytest.mark.parametrize("kind", [Branch, Rows, Count])
@pytest.mark.parametrize("regions", ["layers", "model"])
def test_a_forward_that_cannot_be_traced_prints_no_graph(kind, regions, capfd):
    adapted = compiler.apply(kind(), "adapter a = lora(rank = 2) { on fc }", regions=regions).eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        if regions == "layers":
            assert adapted(x).shape[1:] == kind()(x).shape[1:]
        else:
            with pytest.raises(compiler.ModelError, match="data-dependent") as caught:
                adapted(x)
            assert "GuardOnDataDependentSymNode" in str(caught.value)
            assert type(caught.value.__cause__).__name__ == "GuardOnDataDependentSymNode"
    shown = "".join(capfd.readouterr())
    assert "def forward" not in shown
    assert "Unable to find user code" not in shown


# --- pictures ---


@pytest.fixture
def dot(tmp_path, monkeypatch):
    """A program in graphviz's place, which writes what it was asked for and what it was given."""
    program = tmp_path / "bin" / "dot"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1], sys.stdin.read(7))\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("ending", ["svg", "png", "pdf", "PNG"])
def test_pictures_are_what_their_file_ends_in(place, dot, ending):
    done = peftc("graph", "spec.adapter", "tiny", "-o", f"x.{ending}")
    assert done.code == 0, done.err
    assert (place / f"x.{ending}").read_text() == f"-T{ending.lower()} digraph\n"


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_without_graphviz_a_picture_is_refused_before_a_model_is_loaded(place, monkeypatch, ending):
    monkeypatch.setenv("PATH", str(place))
    for more in (("-o", f"x.{ending}"), ("-o", "x", "--format", ending)):
        done = peftc("graph", "spec.adapter", "no-such-model", *more)
        assert done.code == 3
        assert "E552" in done.err
        assert "install graphviz" in done.err
    assert not list(place.glob("x*"))


def test_what_nothing_is_drawn_as_is_wrong_usage(place, dot):
    done = peftc("graph", "spec.adapter", "tiny", "-o", "x.jpg")
    assert done.code == 2
    assert ".jpg" in done.err
    assert not (place / "x.jpg").exists()
    assert peftc("graph", "spec.adapter", "tiny", "--format", "png").code == 2  # no text for a terminal
    assert peftc("graph", "spec.adapter", "tiny", "-o", "x.jpg", "--format", "png").code == 0
    assert peftc("graph", "spec.adapter", "tiny", "-o", "x.gv").code == 0
    assert (place / "x.gv").read_text().startswith("digraph")


# --- completion ---


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("ch", ["check"]),
        ("ex", ["explain", "export"]),
        ("graph --for", ["--format"]),
        ("graph a b --format p", ["png", "pdf"]),
        ("check a b --task SEQ", ["SEQ_CLS", "SEQ_2_SEQ_LM"]),
        ("methods lok", ["lokr"]),
    ],
)
def test_the_shell_completes(typed, completed):
    words = f"peftc {typed}"
    position = str(len(words.split()) - 1)
    done = alone(_PEFTC_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=position)
    assert done.stdout.split() == completed


def test_the_completion_is_shown_to_be_installed():
    assert "_PEFTC_COMPLETE" in alone("--show-completion", "bash").stdout


# --- the quickstart ---


def test_what_the_trainer_needs_is_an_extra_of_its_own():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [each.partition(">")[0] for each in extras["train"]] == ["accelerate"]
    assert ".[train]" in (ROOT / "README.md").read_text()


def test_the_quickstart_says_what_it_lacks():
    code = (
        "import sys, importlib.util as util\nreal = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'accelerate' else real(name, *more)\n"
        "sys.path.insert(0, 'examples')\nimport quickstart\nquickstart.main()"
    )
    done = alone(code=code)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("pip install '.[train]'")
