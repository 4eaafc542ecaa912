"""The line that says what a call waits for: on a terminal, after a second, and gone afterwards."""

import io
import os
import pty
import re
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
import torch
from torch import nn

from peftc import compiler
from peftc.compiler.api import adapt
from peftc.compiler.report import console, progress
from peftc.compiler.report.progress import step
from peftc.grammar.diagnostics import ModelError

ROOT = Path(__file__).parents[3]
SPEC = "adapter a = lora(rank = 2) { on fc }"


class Terminal:
    """A real one, that remembers what was written to it. Its lines end as files' do."""

    def __init__(self, wide: int = 80):
        self._ours, theirs = pty.openpty()
        mode = termios.tcgetattr(theirs)
        mode[1] &= ~termios.ONLCR
        termios.tcsetattr(theirs, termios.TCSANOW, mode)
        termios.tcsetwinsize(theirs, (24, wide))
        self.stream = os.fdopen(theirs, "w", buffering=1)
        self._bytes = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                found = os.read(self._ours, 4096)
            except OSError:  # nobody has it open any more
                return
            if not found:
                return
            self._bytes += found

    def written(self) -> str:
        """Everything, when nobody will write any more."""
        self.stream.close()
        self._reader.join(5)
        os.close(self._ours)
        return self._bytes.decode()


def screen(written: str) -> list[str]:
    """What is left to see: the lines that are not empty."""
    lines, row, column = [""], 0, 0
    for code, char in re.findall(r"\x1b\[([\d;?]*[A-Za-z])|(.)", written, re.DOTALL):
        if code == "2K":
            lines[row] = ""
        elif char == "\r":
            column = 0
        elif char == "\n":
            lines.append("")
            row, column = row + 1, 0
        elif char:
            lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
            column += 1
    return [each.rstrip() for each in lines if each.strip()]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are tenths here, and nothing of the environment counts."""
    monkeypatch.setattr(progress, "AFTER", 0.1)
    monkeypatch.setattr(progress, "EVERY", 0.01)
    monkeypatch.setattr(progress, "BETWEEN", 0.05)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("PEFTC_PROGRESS", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    time.sleep(0.06)  # the wait of the test before is over


def use(stream: TextIO | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stream be stderr. pytest puts its own into `sys` for each phase of a test."""
    for module in (progress, console):
        monkeypatch.setattr(module, "sys", SimpleNamespace(stderr=stream, stdout=sys.stdout))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    made = Terminal()
    use(made.stream, monkeypatch)
    yield made
    if not made.stream.closed:
        made.written()


def slow(seconds: float = 0.4) -> nn.Module:
    """A model that takes this long to trace, and to run."""

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(seconds)
            return self.fc(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Slow()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[0](x)

    return Net()


X = torch.ones(2, 4)


@pytest.mark.parametrize(("regions", "traced"), [("layers", "Slow"), ("model", "Net")])
def test_it_is_there_while_a_call_waits_and_gone_afterwards(regions: str, traced: str, terminal: Terminal) -> None:
    adapted = compiler.apply(slow(), SPEC, regions=regions)
    print("before", file=terminal.stream)
    adapted(X)
    print("after", file=terminal.stream)
    written = terminal.written()
    assert f"peftc: tracing {traced}, 0 s" in written
    assert screen(written) == ["before", "after"]


def test_a_later_call_shows_nothing(terminal: Terminal) -> None:
    adapted = compiler.apply(slow(), SPEC)
    adapted(X)
    print("first", file=terminal.stream)
    adapted(X)
    assert terminal.written().rpartition("first\n")[2] == ""


@pytest.mark.parametrize("make", [compiler.apply, lambda model, spec, **more: adapt(model, **more)])
def test_it_is_off_by_a_keyword(make: Callable[..., nn.Module], terminal: Terminal) -> None:
    make(slow(), SPEC, progress=False)(X)
    assert terminal.written() == ""


def test_it_is_off_for_what_was_loaded_so(terminal: Terminal, tmp_path: Path) -> None:
    model = slow()
    compiler.apply(model, SPEC).save_pretrained(tmp_path)
    compiler.load(model, tmp_path, progress=False)(X)
    compiler.AdaptedModel.from_pretrained(model, tmp_path, progress=False)(X)
    print("now", file=terminal.stream)
    compiler.load(model, tmp_path)(X)
    before, _, after = terminal.written().partition("now\n")
    assert (before, "tracing Slow" in after) == ("", True)


@pytest.mark.parametrize(("name", "value"), [("PEFTC_PROGRESS", "0"), ("TERM", "dumb"), ("RANK", "1")])
def test_it_is_off_by_the_environment(
    name: str, value: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    compiler.apply(slow(), SPEC)(X)
    assert terminal.written() == ""


def test_nothing_is_written_to_what_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for stream in (io.StringIO(), None):
        use(stream, monkeypatch)
        compiler.apply(slow(), SPEC)(X)
        assert stream is None or stream.getvalue() == ""


def test_a_fast_step_shows_nothing(terminal: Terminal) -> None:
    with step("something"):
        time.sleep(0.02)
    assert terminal.written() == ""


def test_many_fast_steps_are_one_wait(terminal: Terminal) -> None:
    for number in range(20):
        with step(f"step {number}"):
            time.sleep(0.02)
        assert progress._LINE._owner is None
    written = terminal.written()
    assert "step 0" not in written
    assert "step 15" in written
    assert screen(written) == []


def test_steps_far_apart_are_none(terminal: Terminal) -> None:
    for _ in range(4):
        with step("something"):
            time.sleep(0.05)
        time.sleep(0.1)
    assert terminal.written() == ""


def test_a_step_within_another_is_shown_in_its_place(terminal: Terminal) -> None:
    with step("outer"):
        time.sleep(0.2)
        with step("inner"):
            time.sleep(0.2)
        time.sleep(0.1)
    shown = re.findall(r"outer|inner", terminal.written())
    assert [each for at, each in enumerate(shown) if at == 0 or shown[at - 1] != each] == ["outer", "inner", "outer"]


def test_it_is_gone_after_an_error(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def depends_on_data(_: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.3)
        return x if x.sum() > 0 else -x

    adapted = compiler.apply(slow(0.3), SPEC, regions="model")
    monkeypatch.setattr(type(adapted.blocks[0]), "forward", depends_on_data)
    with pytest.raises(ModelError, match="E402"):
        adapted(X)
    print("after", file=terminal.stream)
    written = terminal.written()
    assert "tracing Net" in written
    assert screen(written) == ["after"]
    assert progress._LINE._owner is None


def test_a_line_has_room_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(wide=20)
    use(terminal.stream, monkeypatch)
    monkeypatch.delenv("COLUMNS", raising=False)
    with step("tracing a model with a very long name"):
        time.sleep(0.2)
    written = terminal.written()
    longest = max(len(each) for each in re.split(r"\x1b\[2K|\r", written))
    assert "peftc: tracing a…" in written
    assert longest < 20


def test_other_threads_have_no_line_of_their_own(terminal: Terminal) -> None:
    begun, over = threading.Event(), threading.Event()

    def first() -> None:
        with step("first"):
            begun.set()
            over.wait(5)

    def second() -> None:
        begun.wait(5)
        with step("second"):
            time.sleep(0.2)

    threads = [threading.Thread(target=each) for each in (first, second)]
    for each in threads:
        each.start()
    threads[1].join()
    over.set()
    threads[0].join()
    written = terminal.written()
    assert "first" in written
    assert "second" not in written
    assert screen(written) == []


def test_threads_that_trace_at_once(terminal: Terminal) -> None:
    models = [compiler.apply(slow(0.2), SPEC) for _ in range(3)]
    threads = [threading.Thread(target=each, args=(X,)) for each in models]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    print("after", file=terminal.stream)
    assert screen(terminal.written()) == ["after"]


def test_the_line_of_a_command_is_the_only_one(terminal: Terminal) -> None:
    with console.progress(True) as tell:
        tell("a command")
        with step("something"):
            time.sleep(0.3)
    with step("something else"):
        time.sleep(0.3)
    written = terminal.written()
    assert re.search(r"something(?! else)", written) is None
    assert "a command" in written
    assert "something else" in written


def test_a_terminal_that_goes_away_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    use(terminal.stream, monkeypatch)
    with step("something"):
        terminal.stream.close()
        time.sleep(0.2)
    with step("something"):
        time.sleep(0.2)
    assert progress._LINE._owner is None


CHILD = """
import sys
from tests.compiler.report.test_progress import SPEC, X, compiler, slow
compiler.apply(slow(2.0), SPEC)(X)
print("done", file=sys.stderr)
"""


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_a_process_of_its_own(kind: str) -> None:
    """With the seconds that users have, and rich as it finds a terminal by itself."""
    terminal = Terminal()
    env = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    target = terminal.stream if kind == "terminal" else subprocess.PIPE
    done = subprocess.run([sys.executable, "-c", CHILD], stderr=target, env=env, cwd=ROOT, text=True, check=True)
    written = terminal.written()
    if kind == "terminal":
        assert "peftc: tracing Slow, 1 s" in written
        assert screen(written)[-1] == "done"
        assert not any("peftc" in line for line in screen(written))
    else:
        assert written == ""
        assert "tracing" not in done.stderr
        assert done.stderr.endswith("done\n")
