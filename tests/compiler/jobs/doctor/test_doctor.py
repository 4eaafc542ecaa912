import os
from importlib import import_module

import pytest

from peftc.compiler.jobs.doctor.checks import CHECKS, Check
from peftc.compiler.jobs.doctor.doctor import doctor, help_for, library_facts
from peftc.compiler.report.installation import LibraryFacts
from peftc.compiler.versions import Library
from tests.compiler.commands.cli_help import peftc

# Checks that need no torch, as a library could make real ones end.
FAKES = """
import os, sys, time

def devices():
    return {"cpu": "1 threads"}

def good():
    print("a library that prints")
    return "seen"

def raises():
    raise ImportError("cannot import name 'x' from 'y'\\nand more")

def leaves():
    sys.exit("a library that leaves")

def dies():
    print("corrupted size vs. prev_size", file=sys.stderr, flush=True)
    os.abort()

def hangs():
    time.sleep(600)
"""

# As a release of a library that writes other numbers than it was given, and says nothing.
BROKEN_LIBRARY = """
import sys

if any("doctor.child" in word for word in sys.orig_argv):
    import safetensors.torch

    real = safetensors.torch.save_file

    def save_file(tensors, *arguments, **options):
        return real({name: tensor * 1.5 for name, tensor in tensors.items()}, *arguments, **options)

    safetensors.torch.save_file = save_file
"""


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """Puts a file where Python finds it first, in processes that are started from here."""

    def put(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        inherited = os.environ.get("PYTHONPATH", "")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), inherited))))

    return put


def fake(name, *needs):
    return Check(name, "fake_checks", name, needs)


@pytest.fixture
def without_torch(on_path, monkeypatch):
    """No check imports torch: the process that runs them starts at once."""
    on_path("fake_checks.py", FAKES)
    monkeypatch.setattr("peftc.compiler.jobs.doctor.doctor.DEVICES", fake("devices"))


def test_whatever_a_library_does_is_a_line_of_the_report(without_torch):
    names = ("good", "raises", "leaves", "dies", "hangs", "good")
    absent = Check("absent", "fake_checks", "good", ("no-such-library",))
    checks, asked = [*map(fake, names), absent], []
    facts = doctor(checks=checks, patience=3, on_check=asked.append)
    assert asked == ["devices", *names]
    assert [check.status for check in facts.checks] == ["ok", *["fails"] * 4, "ok", "not installed"]
    good, raised, left, died, hung, after, _ = facts.checks
    assert good.told == after.told == "seen"
    assert raised.told == "ImportError: cannot import name 'x' from 'y' (fake_checks.py:12)"
    assert left.told.startswith("SystemExit: a library that leaves")
    assert died.told == "the process ended with signal SIGABRT: corrupted size vs. prev_size"
    assert hung.told.startswith("the process ended with signal SIGKILL")
    assert all(check.help for check in facts.checks if check.status == "fails")
    assert not facts.ok


def test_a_library_that_gives_other_numbers_is_found(on_path):
    on_path("sitecustomize.py", BROKEN_LIBRARY)
    checks = [check for check in CHECKS if check.name in ("training", "save and load")]
    training, saving = doctor(checks=checks).checks
    assert training.status == "ok"
    assert saving.status == "fails"
    assert saving.told.startswith("outputs of the adapter before and after differ by ")


@pytest.mark.parametrize(("checks", "code"), [(("good",), 0), (("good", "raises"), 1)])
def test_the_command_ends_with_what_was_found(checks, code, without_torch, monkeypatch):
    monkeypatch.setattr(doctor, "__kwdefaults__", {**doctor.__kwdefaults__, "checks": [*map(fake, checks)]})
    done = peftc("doctor")
    assert done.code == code
    assert ("help: " in done.out) == bool(code)
    told = peftc("doctor", "--json")
    assert told.code == code
    assert told.json["ok"] is not bool(code)
    assert [check["status"] for check in told.json["checks"]] == ["ok", "fails"][: len(checks)]
    assert {"torch", "transformers", "trl"} <= {library["name"] for library in told.json["libraries"]}


def test_every_check_is_there_and_says_what_must_be_so():
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        assert getattr(import_module(check.module), check.function).__doc__, check.name


KNOWN = Library("torch", (2, 11), (2, 14))


@pytest.mark.parametrize(
    ("version", "standing"), [("2.13.0+cpu", "tested"), ("2.15.0", "newer"), ("2.9.1", "older"), (None, "")]
)
def test_how_a_version_stands(version, standing):
    assert library_facts(KNOWN, version) == LibraryFacts("torch", version, "2.11 to 2.14", standing)


def test_help_names_what_to_install_instead():
    torch = library_facts(KNOWN, "2.15.0")
    hub = library_facts(Library("transformers", (5, 23), (5, 24)), "5.23.0")
    hqq = library_facts(Library("hqq", (0, 2), (0, 2)), "0.3.0")
    check = Check("hqq", "m", "f", ("hqq",))
    told = help_for(Check("trace", "m", "f"), [torch, hub, hqq])
    assert told == "pip install 'torch>=2.11,<2.15': these were tested, and torch 2.15.0 not"
    assert "'torch>=2.11,<2.15' 'hqq>=0.2,<0.3'" in help_for(check, [torch, hub, hqq])
    assert help_for(check, [hub]).startswith("transformers 5.23.0 were tested: please report")
