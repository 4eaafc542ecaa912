import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from peftc.compiler import versions
from peftc.compiler.versions import OPTIONAL, TESTED, release, untested
from tests.compiler.commands.cli_help import peftc

ROOT = Path(__file__).parents[2]

USE = """
import warnings
import torch
from peftc import compiler

spec = "adapter a = lora(rank = 2) { on all linear }"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        compiler.apply(torch.nn.Sequential(torch.nn.Linear(3, 3)), spec)
for warning in caught:
    if "newer than" in str(warning.message):
        print(f"{warning.filename}:{warning.lineno}: {warning.message}")
"""


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, 0),
        ("2.11.0", 0),
        ("2.13.0+cpu", 0),
        ("2.14.1", 0),
        ("2.15.0", 1),
        ("2.15.0.dev20270101+cu130", 1),
        ("3.0", 1),
        ("2.9.1", 0),  # pip keeps to the floor; this is no floor
        ("unknown", 0),
    ],
)
def test_what_is_newer_than_tested_is_said(version, said):
    sentences = untested(lambda name: version if name == "torch" else None)
    assert len(sentences) == said
    if said:
        assert sentences[0] == f"torch {version} is newer than what peftc was tested with (up to 2.14)"


def test_what_is_installed_here_is_tested():
    assert untested() == ()


def test_a_minor_release_is_a_number():
    assert release("5.9.0") < release("5.24.0")


def test_the_oldest_that_is_tested_is_the_floor():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    for library in (*TESTED, *OPTIONAL):
        (floor,) = [text.removeprefix(f"{library.name}>=") for text in asked if text.startswith(f"{library.name}>=")]
        assert release(floor) == library.oldest


@pytest.fixture
def newer(tmp_path):
    """An environment in which transformers says of itself that it is 9.9.0."""
    metadata = tmp_path / "newer" / "transformers-9.9.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.9.0\n", encoding="utf-8")
    inherited = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(metadata.parents[1]), inherited)))}


def python(*arguments, env):
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=True)


def test_a_process_is_warned_once_and_at_its_own_line(newer, tmp_path):
    script = tmp_path / "use.py"
    script.write_text(USE, encoding="utf-8")
    (line,) = python(str(script), env=newer).stdout.splitlines()
    assert line.startswith(f"{script}:10: transformers 9.9.0 is newer than")
    assert "`peftc doctor`" in line


def test_the_command_line_warns(tmp_path, monkeypatch):
    spec = tmp_path / "a.adapter"
    spec.write_text("adapter a = lora(rank = 2) { on q_proj }\n", encoding="utf-8")
    monkeypatch.setattr(versions, "untested", lambda: ("abacus 9 is newer than what peftc was tested with",))
    versions.warn_if_untested.cache_clear()
    done = peftc("compile", spec, ROOT / "examples" / "tiny-llama")
    versions.warn_if_untested.cache_clear()
    assert done.code == 0
    assert done.err.count("warning: abacus 9 is newer") == 1
    assert "versions.py" not in done.err


def test_the_language_alone_warns_of_nothing(newer):
    program = "import warnings; warnings.simplefilter('error'); from peftc.grammar.spec.elaborate import read_spec"
    assert python("-c", program, env=newer).stderr == ""
