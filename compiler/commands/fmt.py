"""peftc fmt"""

import difflib
import sys
from pathlib import Path
from typing import Annotated

import typer

from peftc.compiler.export_model.output import write_text
from peftc.compiler.report import console
from peftc.grammar.diagnostics import AdapterError, Diagnostic, SpecError
from peftc.grammar.source import Source
from peftc.grammar.syntax.format import format_source
from peftc.grammar.syntax.load import load_source

STDIN = "-"


def fmt(
    specs: Annotated[
        list[Path], typer.Argument(metavar="SPEC...", help="Files to format in place; - reads stdin and writes stdout.")
    ],
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 if a file would change.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Write nothing but the differences, to stdout.")] = False,
) -> None:
    """Write .adapter files in their canonical form; every comment is kept."""
    problems: list[Diagnostic] = []
    changed = 0
    for each in specs:
        try:
            changed += _format(each, check=check, diff=diff)
        except AdapterError as error:
            problems += error.diagnostics
    if problems:
        raise SpecError(*problems)
    if check and changed:
        console.say(f"{changed} of {len(specs)} would change", label="fmt")
        raise typer.Exit(1)


def _format(path: Path, *, check: bool, diff: bool) -> bool:
    """Format one file as asked; whether it was not in canonical form."""
    is_stdin = str(path) == STDIN
    source = _stdin() if is_stdin else load_source(path)
    formatted = format_source(source)
    changed = formatted != source.text
    if diff and changed:
        old, new = source.text.splitlines(keepends=True), formatted.splitlines(keepends=True)
        for line in difflib.unified_diff(old, new, source.name, f"{source.name} (formatted)"):
            console.write(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n")
    elif check and changed:
        console.say(f"{source.name} would change", label="fmt")
    elif is_stdin and not check and not diff:
        console.write(formatted)
    elif changed:
        write_text(path, formatted)
        console.say(f"{source.name} formatted", label="fmt")
    return changed


def _stdin() -> Source:
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"not UTF-8 text (byte at offset {error.start})"
        raise SpecError(Diagnostic("E102", message, where="<stdin>")) from error
    return Source("<stdin>", text.replace("\r\n", "\n"))
