"""The files of .ci are what they say: floors that are pyproject's, tests that are there, README's own commands."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CI = ROOT / ".ci"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Not run on floors: tools that look at text.
TOOLS = {"mypy", "ruff"}


def lines(name):
    return [line for line in (CI / name).read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def floors(requirements):
    """`numpy>=1.26` -> {"numpy": "1.26"}. A ceiling, or a pin, is no floor and fails."""
    parts = [re.fullmatch(r"([\w-]+)>=([\d.]+)", text) for text in requirements]
    assert all(parts), requirements
    return {part[1]: part[2] for part in parts if part[1] not in TOOLS}


def every_requirement():
    optional = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
    return [*PROJECT["dependencies"], *optional]


def disagreeing(installed, asked):
    """Names whose version is not the first one that the floor admits, or that only one of the two knows."""
    wrong = set(installed) ^ set(asked)
    for name in set(installed) & set(asked):
        if not f"{installed[name]}.".startswith(f"{asked[name]}."):
            wrong.add(name)
    return wrong


def test_floors_are_those_of_the_project():
    installed = dict(text.split("==") for text in lines("floors.txt"))
    asked = floors(every_requirement())
    assert disagreeing(installed, asked) == {"torch"}
    assert installed["torch"].startswith("2.13.")  # the small one
    assert lines("constraints.txt") == ["torch==2.13.*"]


def test_another_floor_is_noticed():
    assert disagreeing({"a": "1.2.1", "b": "2.10"}, {"a": "1.2", "b": "2.1"}) == {"b"}
    assert disagreeing({"a": "1.2"}, {"a": "1.2", "b": "1"}) == {"b"}
    with pytest.raises(AssertionError):
        floors(["torch>=2.11,<3"])


def test_the_floor_leg_has_tests_of_every_kind():
    text = (CI / "floor-tests.txt").read_text(encoding="utf-8")
    kinds = re.findall(r"^# (trace|parity|prefix|export|save and load)\b.*\n(?!#)", text, re.MULTILINE)
    assert kinds == ["trace", "parity", "prefix", "export", "save and load"]
    for line in lines("floor-tests.txt"):
        file, _, test = line.partition("::")
        assert (ROOT / file).exists(), line
        if test:
            assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), line


@pytest.mark.parametrize("script", ["run", "floor"])
def test_scripts_are_strict_and_parse(script):
    text = (CI / script).read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert (CI / script).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(CI / script)], check=True)


def test_wrong_usage_of_the_gate_runs_nothing():
    done = subprocess.run([str(CI / "run"), "--slow"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")


def test_a_step_that_fails_ends_the_gate():
    program = f'set -euo pipefail; source {CI}/steps; step "one" "false | cat"; echo after'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "after" not in done.stdout
    assert "=== one\n$ false | cat" in done.stdout


def test_steps_install_with_the_constraint():
    program = f'source {CI}/steps; step "one" "echo \\$PIP_CONSTRAINT"; summary'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert str(CI / "constraints.txt") in done.stdout.splitlines()
    assert re.search(r"^one +0 s$", done.stdout, re.MULTILINE)
