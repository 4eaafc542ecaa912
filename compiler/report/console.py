"""What the command line prints where: results on stdout, everything else on stderr, one JSON document for scripts."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console, RenderableType
from rich.text import Text

from peftc.compiler.report.progress import taken
from peftc.grammar.diagnostics import Diagnostic

PLAIN_WIDTH = 120

_HEAD = re.compile(r"error\[E\d+\]:")
_CARETS = re.compile(r"^ +\^+$", re.MULTILINE)
_HELP = re.compile(r"^  help:", re.MULTILINE)


def show(content: RenderableType) -> None:
    """A result for people, on stdout."""
    _console(sys.stdout).print(content, highlight=False)


def write(text: str) -> None:
    """A result as it is, on stdout."""
    sys.stdout.write(text)


def write_json(value: Any) -> None:
    """The one JSON document of a `--json` call."""
    write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def say(message: str, *, label: str = "note", style: str = "cyan") -> None:
    """A line beside the result, on stderr."""
    line = Text.assemble((f"{label}: ", style), message)
    _console(sys.stderr).print(line, soft_wrap=True, highlight=False)


def warn(message: str) -> None:
    """Something that looks wrong and does not stop the work."""
    say(message, label="warning", style="yellow")


def complain(diagnostics: Sequence[Diagnostic]) -> None:
    """Diagnostics on stderr, coloured on a terminal."""
    console = _console(sys.stderr)
    for each in diagnostics:
        text = Text(each.render())
        for pattern, style in ((_HEAD, "bold red"), (_CARETS, "bold red"), (_HELP, "cyan")):
            text.highlight_regex(pattern, style)
        console.print(text, soft_wrap=True, highlight=False)


def as_json(diagnostic: Diagnostic) -> dict[str, Any]:
    """A diagnostic for scripts; `file`, `line` and `column` are null where there is no place."""
    span = diagnostic.span
    return {
        "code": diagnostic.code,
        "message": diagnostic.message,
        "file": span.source.name if span else diagnostic.where or None,
        "line": span.line if span else None,
        "column": span.column if span else None,
        "help": diagnostic.help or None,
    }


@contextmanager
def progress(enabled: bool) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done, while it is; nothing where stderr is no terminal."""
    console = _console(sys.stderr)
    if not (enabled and console.is_terminal):
        yield lambda _: None
        return
    with taken(), console.status("starting") as status:
        yield lambda message: status.update(message)


class _Console(Console):
    """As rich's, which would leave the process by itself when nobody reads its output any more."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console(file: IO[str]) -> Console:
    """Made for each use: the stream may be another one by then. A pipe has no width, and needs none."""
    width = PLAIN_WIDTH if not file.isatty() and not os.environ.get("COLUMNS") else None
    return _Console(file=file, width=width)
