"""The programs under examples/ run and say what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peftc import compiler
from peftc.grammar.spec.elaborate import read_spec

ROOT = Path(__file__).parents[1]


def run(*words: str, cwd: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quickstart(tmp_path):
    printed = run("quickstart.py", "--steps", "40", "--output", "run", cwd=tmp_path)
    losses = [float(each) for each in re.findall(r"loss (\d+\.\d+)", printed)]
    assert len(losses) >= 10
    assert losses[-1] < losses[0] - 1
    assert {each.name for each in (tmp_path / "run" / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (tmp_path / "run" / "merged" / "model.safetensors").exists()
    assert "reloaded == trained" in printed
    assert "merged == unmerged" in printed


def test_plain_module(tmp_path):
    printed = run("plain_module.py", cwd=tmp_path)
    base, adapted, disabled = (
        [float(each) for each in re.findall(r"(?:rings|halves) (\d\.\d\d)", line)]
        for line in printed.splitlines()
        if line.startswith(("base", "adapted", "disabled"))
    )
    assert base[0] > 0.95
    assert base[1] < 0.7
    assert adapted[1] > 0.95
    assert disabled[0] == base[0]
    assert not list(tmp_path.iterdir())


def test_serve(tmp_path):
    printed = run("serve.py", "--output", "out", cwd=tmp_path)
    assert {each.name for each in (tmp_path / "out").iterdir()} >= {"generate.pt2", "manifest.json"}
    said = dict(re.findall(r"^(\w+): (\[.*\]) \(the same as generate\)$", printed, re.MULTILINE))
    assert said.keys() == {"formal", "poetic", "terse", "__base__"}
    assert len(set(said.values())) == len(said)


@pytest.mark.parametrize("program", ["quickstart.py", "plain_module.py", "serve.py"])
def test_usage_is_in_the_docstring(program):
    text = (ROOT / "examples" / program).read_text(encoding="utf-8")
    assert f"python examples/{program}" in text


def test_the_method_of_the_example_is_that_of_the_page():
    page = (ROOT / "docs" / "own-method.md").read_text(encoding="utf-8")
    block = re.search(r"^```adapter\n# gated\.adapter\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert read_spec(block[1]) == read_spec(ROOT / "examples" / "gated.adapter")


@pytest.mark.parametrize("name", ["prefix", "tokens", "quickstart"])
def test_the_specs_fit_the_model_beside_them(name):
    found = compiler.find_model(str(ROOT / "examples" / "tiny-llama"))
    adapters, problems = compiler.check_fit(read_spec(ROOT / "examples" / f"{name}.adapter"), found)
    assert not problems
    assert all(each.parameters for adapter in adapters for each in adapter.rules)
