"""What went wrong, where, and what to do instead."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from peftc.grammar.source import Span


@dataclass(frozen=True)
class Diagnostic:
    """One message. `code` is stable (`E201`), `help` says what to do, `span` says where in a spec.

    `where` names the place when it is not in a spec: a file, a checkpoint key, a module.
    """

    code: str
    message: str
    span: Span | None = None
    help: str = ""
    where: str = ""

    def render(self) -> str:
        """`file:line:column: error[code]: message`, the line, carets under the span, and the help."""
        place = self.where
        if self.span is not None:
            place = f"{self.span.source.name}:{self.span.line}:{self.span.column}"
        lines = [f"{place}: error[{self.code}]: {self.message}" if place else f"error[{self.code}]: {self.message}"]
        if self.span is not None:
            lines += _excerpt(self.span)
        lines += [f"  help: {line}" if i == 0 else f"        {line}" for i, line in enumerate(self.help.splitlines())]
        return "\n".join(lines)


class AdapterError(ValueError):
    """Raised for anything a user can mend; `diagnostics` holds at least one message.

    It is a ValueError, which is what PEFT and transformers raise for the same mistakes. `str(error)` is the rendered
    text, so an uncaught error already shows the caret.
    """

    def __init__(self, *diagnostics: Diagnostic):
        self.diagnostics = diagnostics
        super().__init__("\n".join(each.render() for each in diagnostics))


class SpecError(AdapterError):
    """A spec or method file is wrong in itself (E1xx syntax and types) or for this model (E2xx)."""


class CheckpointError(AdapterError):
    """A checkpoint cannot be read, or does not fit the model (E3xx)."""


class ModelError(AdapterError):
    """A model cannot be loaded, traced or rewritten as asked (E4xx)."""


class UsageError(AdapterError):
    """A call on an adapted model that its state does not allow (E5xx)."""


class ArgumentTypeError(UsageError, TypeError):
    """An argument is of a type that means nothing there, or is missing, or given twice."""


def fail(
    error: type[AdapterError], code: str, message: str, span: Span | None = None, help: str = "", where: str = ""
) -> NoReturn:
    """Raise one diagnostic as `error`."""
    raise error(Diagnostic(code, message, span, help, where))


def nearest(word: str, known: Iterable[str], limit: int = 3) -> tuple[str, ...]:
    """The known words most like `word`, best first; empty when none is close. Those that differ in case alone first."""
    words = sorted(set(known))
    cased = [each for each in words if each.lower() == word.lower()]
    return tuple(cased or difflib.get_close_matches(word, words, n=limit, cutoff=0.6))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A help line naming the nearest words, or an empty string."""
    close = nearest(word, known)
    if not close:
        return ""
    return f"did you mean {' or '.join(repr(each) for each in close)}?"


_WIDTH = 160


def _excerpt(span: Span) -> list[str]:
    """The span's first line and carets under it; tabs become spaces and long lines are cut around the span."""
    line = span.source.lines[span.line - 1]
    start = span.column - 1
    end = max(start + 1, min(len(line), start + span.end - span.start))
    if len(line) > _WIDTH:
        cut = max(0, start - _WIDTH // 2)
        line, start, end = line[cut : cut + _WIDTH], start - cut, min(end - cut, _WIDTH)
    return [f"    {line.expandtabs(1).rstrip()}", f"    {' ' * start}{'^' * max(1, end - start)}"]
