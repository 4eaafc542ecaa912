"""PEFT's tests get peftc's names, and nothing else of them changes."""

import subprocess
import sys
from pathlib import Path

from peftc import peft as public
from tests.peft_suite.plugin import rows
from tests.peft_suite.prepared import BEHIND, prepare, redirected

ROOT = Path(__file__).parents[2]
TEXT = """import os, re
import peft
from peft import (
    LoraConfig,
    get_peft_model as made,
)
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from .peft import own

def test():
    from peft import PeftModel
    assert "from peft import x"
"""


def test_public_names_come_from_behind_and_lines_stay():
    made = redirected(TEXT, frozenset(public.__all__))
    assert made.splitlines() == [
        "import os, re",
        f"import {BEHIND} as peft",
        f"from {BEHIND} import LoraConfig, get_peft_model as made",
        "",
        "",
        "",
        "from peft.tuners.lora import LoraLayer",
        f"from {BEHIND} import hotswap_adapter; from peft.utils.hotswap import prepare_model_for_compiled_hotswap",
        "from .peft import own",
        "",
        "def test():",
        f"    from {BEHIND} import PeftModel",
        '    assert "from peft import x"',
    ]


NO_TESTS = 5  # the exit code of pytest
SUITE = """
import pytest, torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from . import testing_utils

def make():
    return get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))

def test_whose_it_is():
    assert type(make()).__mro__[0].__name__ == "Sequential"

def test_internals():
    assert make().base_model.model[0].lora_A

@pytest.mark.regression
def test_no_network():
    assert "any/model" in testing_utils._HUB_MODEL_ACCESSES
    assert LoraModel.__module__.startswith("peft.")

def test_skipped():
    pytest.skip("not here")
"""


def test_a_suite_is_run_on_both_sides_and_kept(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_made_up.py").write_text(SUITE)
    (tmp_path / "tests" / "testing_utils.py").write_text("_HUB_MODEL_ACCESSES = {}\n")
    found = {}
    for side, names in (("peft", None), ("peftc", frozenset(public.__all__))):
        prepare(tmp_path / "tests", tmp_path / side / "peft_tests", names)
        results = tmp_path / f"{side}.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.peft_suite.plugin", "-p", "no:cacheprovider"]
        command += ["-c", "/dev/null", "--rootdir", ".", "--results", str(results), "peft_tests/test_made_up.py"]
        for _ in range(2):  # the second time there is nothing left to run
            run = subprocess.run(
                command, cwd=tmp_path / side, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
            )
        assert run.returncode == NO_TESTS, run.stdout + run.stderr
        found[side] = {row["test"].partition("::")[2]: row for row in rows(results)}
    outcomes = {side: {name: row["outcome"] for name, row in own.items()} for side, own in found.items()}
    assert outcomes["peft"] == {
        "test_whose_it_is": "failed",
        "test_internals": "passed",
        "test_no_network": "passed",
        "test_skipped": "skipped",
    }
    assert outcomes["peftc"] == outcomes["peft"] | {"test_whose_it_is": "passed", "test_internals": "failed"}
    row = found["peftc"]["test_internals"]
    assert row["error"] == "AttributeError"
    assert "no attribute 'lora_A'" in row["message"]
    assert row["line"] == "test_made_up.py: assert make().base_model.model[0].lora_A"
