"""A line on the terminal that says what a call waits for, while it waits longer than a second; see `step`."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.spinner import Spinner
from rich.text import Text

AFTER = 1.0
"""Seconds until something is shown: most calls are done by then."""

BETWEEN = 0.5
"""Steps so many seconds apart are parts of one wait: a call traces one kind of layer after the other."""

EVERY = 0.1
VARIABLE = "PEFTC_PROGRESS"

_NEW_LINE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))


@contextmanager
def step(what: str) -> Iterator[None]:
    """Inside, `what` is being done: a line on stderr says so, where that is a terminal, once it takes over a second.

    The line is gone when the block is left, in whatever way. Steps within steps, and soon after, are one wait. A
    terminal has one line: what other threads do meanwhile is not shown. The variable `PEFTC_PROGRESS=0` turns it off.
    """
    entered = _LINE.enter(what)
    try:
        yield
    finally:
        if entered:
            _LINE.leave()


@contextmanager
def taken() -> Iterator[None]:
    """Inside, somebody else has a line on the terminal: steps show nothing."""
    _LINE.hold(1)
    try:
        yield
    finally:
        _LINE.hold(-1)


class _Line:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = 0
        self._owner: int | None = None  # the thread whose steps are shown
        self._began = self._ended = 0.0
        self._steps: list[str] = []
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def hold(self, number: int) -> None:
        with self._lock:
            self._held += number

    def enter(self, what: str) -> bool:
        """Begin a step. False where it is not to be shown."""
        with self._lock:
            if self._owner == threading.get_ident():
                self._steps.append(what)
                return True
            if self._owner is not None or self._held or not _is_wanted():
                return False
            now = time.monotonic()
            if now - self._ended > BETWEEN:
                self._began = now
            self._owner, self._steps, self._done = threading.get_ident(), [what], threading.Event()
            self._thread = threading.Thread(target=self._show, args=(self._done, sys.stderr), daemon=True)
            self._thread.start()
            return True

    def leave(self) -> None:
        """End a step; with the last one the line goes."""
        with self._lock:
            self._steps.pop()
            if self._steps:
                return
            self._owner, self._ended = None, time.monotonic()
            done, thread = self._done, self._thread
        done.set()
        if thread is not None:
            thread.join(timeout=1)  # a terminal that is held up holds up nobody for long

    def _show(self, done: threading.Event, stream: TextIO) -> None:
        if done.wait(max(0.0, self._began + AFTER - time.monotonic())):
            return
        console, spinner = Console(file=stream), Spinner("dots")
        try:
            while True:
                steps = self._steps
                what = steps[-1] if steps else ""
                now = time.monotonic()
                frame = spinner.render(now)
                line = Text.assemble(frame if isinstance(frame, Text) else "", f" peftc: {what}")
                line.append(f", {now - self._began:.0f} s")
                line.truncate(_width(stream) - 1, overflow="ellipsis")
                console.control(_NEW_LINE)
                console.print(line, end="", soft_wrap=True, highlight=False)
                if done.wait(EVERY):
                    break
            console.control(_NEW_LINE)
        except (OSError, ValueError):  # the terminal went away
            return


def _width(stream: TextIO) -> int:
    """How many characters fit on a line, which may change. A line that is longer could not be taken away again."""
    return max(2, os.get_terminal_size(stream.fileno()).columns or 80)


def _is_wanted() -> bool:
    """Whether there is a terminal that can take a line away again, and nobody who does not want one.

    Of processes that train together, and have one terminal between them, the first one has the line.
    """
    if os.environ.get(VARIABLE) == "0" or os.environ.get("TERM") == "dumb" or os.environ.get("RANK", "0") != "0":
        return False
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # no stderr, or a closed one
        return False


_LINE = _Line()
