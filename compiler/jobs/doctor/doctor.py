"""doctor: does peftc work with what is installed here? Versions, devices, and checks on tiny models."""

import json
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import IO, Any

from peftc.compiler.jobs.doctor.checks import CHECKS, DEVICES, UNTRIED, Check
from peftc.compiler.report.installation import CheckFacts, DoctorFacts, LibraryFacts
from peftc.compiler.versions import OPTIONAL, TESTED, Library, installed, release

PATIENCE = 300.0  # seconds that one check may take, on the slowest machines
_CHILD = "peftc.compiler.jobs.doctor.child"


def doctor(
    *,
    checks: Sequence[Check] = CHECKS,
    on_check: Callable[[str], None] | None = None,
    patience: float = PATIENCE,
) -> DoctorFacts:
    """Check this installation: about a minute, without the network. No failure of a library is raised.

    Args:
        checks: Which, and in which order; all, unless said.
        on_check: Called with the name of each check before it runs.
        patience: Seconds that one check may take.
    """
    libraries = tuple(library_facts(tested, installed(tested.name)) for tested in (*TESTED, *OPTIONAL))
    libraries += tuple(LibraryFacts(name, installed(name)) for name in UNTRIED)
    missing = {name for check in checks for name in check.needs if installed(name) is None}
    wanted = [DEVICES, *(check for check in checks if not missing & set(check.needs))]
    given = _run(wanted, on_check or (lambda name: None), patience)
    answers = {check.name: answer for check, answer in zip(wanted, given, strict=True)}
    facts = [_facts(check, answers.get(check.name), missing, libraries) for check in checks]
    devices = answers[DEVICES.name]["told"] or {"none": answers[DEVICES.name]["error"]}
    return DoctorFacts(platform.python_version(), platform.platform(), libraries, devices, tuple(facts))


def library_facts(tested: Library, version: str | None) -> LibraryFacts:
    """How an installed version stands to those that were tested."""
    oldest, newest = (".".join(map(str, number)) for number in (tested.oldest, tested.newest))
    span = oldest if oldest == newest else f"{oldest} to {newest}"
    number = release(version) if version else None
    if number is None:
        return LibraryFacts(tested.name, version, span)
    standing = "newer" if number > tested.newest else "older" if number < tested.oldest else "tested"
    return LibraryFacts(tested.name, version, span, standing)  # type: ignore[arg-type]


def help_for(check: Check, libraries: Sequence[LibraryFacts]) -> str:
    """What to install instead of what was never tested; where all was, that this is a bug."""
    concerned = {"torch", "transformers", *check.needs}
    ranges = {tested.name: tested for tested in (*TESTED, *OPTIONAL)}
    strange = [library for library in libraries if library.name in concerned and library.standing in ("newer", "older")]
    if strange:
        wanted = " ".join(f"'{_range(ranges[library.name])}'" for library in strange)
        return f"pip install {wanted}: these were tested, and {_list(strange)} not"
    here = [library for library in libraries if library.name in concerned and library.standing == "tested"]
    also = f"; the rest of peftc works without {check.needs[0]}" if check.needs else ""
    return f"{_list(here)} were tested: please report this with what `peftc doctor --json` prints{also}"


def _range(tested: Library) -> str:
    (low, below), (high, above) = tested.oldest, tested.newest
    return f"{tested.name}>={low}.{below},<{high}.{above + 1}"


def _list(libraries: Sequence[LibraryFacts]) -> str:
    return ", ".join(f"{library.name} {library.version}" for library in libraries)


def _facts(
    check: Check, answer: dict[str, Any] | None, missing: set[str], libraries: Sequence[LibraryFacts]
) -> CheckFacts:
    if answer is None:
        absent = [name for name in check.needs if name in missing]
        return CheckFacts(check.name, "not installed", f"needs {', '.join(absent)}")
    seconds = round(answer["seconds"], 2)
    if answer["error"] is None:
        return CheckFacts(check.name, "ok", answer["told"], seconds)
    return replace(CheckFacts(check.name, "fails", answer["error"], seconds), help=help_for(check, libraries))


def _run(checks: Sequence[Check], on_check: Callable[[str], None], patience: float) -> Iterator[dict[str, Any]]:
    """Every check's answer. A process that ends before its time is the answer of the check it was at."""
    left = list(checks)
    while left:
        with tempfile.TemporaryFile("w+", errors="replace") as complaints:
            command = [sys.executable, "-m", _CHILD, *(f"{check.module}:{check.function}" for check in left)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True)
            assert process.stdout is not None
            try:
                for answer in _answers(process, process.stdout, left, on_check, patience):
                    left.pop(0)
                    yield answer
            finally:
                process.kill()
                code = process.wait()
                process.stdout.close()
            if left:
                left.pop(0)
                yield {"told": None, "error": _ended(code, complaints), "seconds": 0.0}


def _answers(
    process: "subprocess.Popen[str]",
    lines: IO[str],
    left: Sequence[Check],
    on_check: Callable[[str], None],
    patience: float,
) -> Iterator[dict[str, Any]]:
    while left:
        on_check(left[0].name)
        timer = threading.Timer(patience, process.kill)
        timer.start()
        line = lines.readline()
        timer.cancel()
        if not line:
            process.wait()
            return
        yield json.loads(line)


def _ended(code: int, complaints: IO[str]) -> str:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    complaints.seek(0)
    last = [line.strip() for line in complaints.read().splitlines() if line.strip()][-1:]
    return f"the process ended with {how}{': ' if last else ''}{''.join(last)[:200]}"
