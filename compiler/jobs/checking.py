"""check: everything that is wrong with a spec, at once."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path

from peftc.grammar.diagnostics import Diagnostic, SpecError
from peftc.grammar.method.check import check_method
from peftc.grammar.source import Source
from peftc.grammar.spec.elaborate import elaborate, read_source
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.spec.spec import Spec
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.parse import parse

MAX_TRIES = 400


def check(path_or_text: str | PathLike[str]) -> tuple[Spec | None, tuple[Diagnostic, ...]]:
    """The spec in a file or text, and every diagnostic: no spec if there are some, and none if there is one."""
    try:
        source, directory = read_source(path_or_text)
        file = parse(source)
    except SpecError as error:
        return None, error.diagnostics
    try:
        return elaborate(file, source, directory=directory), ()
    except SpecError as error:
        return None, _all(file, source, directory, error)


def _all(file: tree.File, source: Source, directory: Path | None, first: SpecError) -> tuple[Diagnostic, ...]:
    """Elaborating stops at the first mistake; parts of the file, looked at on their own, show the others.

    A message only counts when its place is not the place of another, so what one mistake causes is said once.
    """
    found: dict[object, Diagnostic] = {_place(each): each for each in first.diagnostics}

    def attempt(action: Callable[[], object]) -> None:
        try:
            action()
        except SpecError as error:
            for each in error.diagnostics:
                found.setdefault(_place(each), each)

    for number, part in enumerate(_parts(file)):
        if number == MAX_TRIES:
            break
        if isinstance(part, tree.Method):
            attempt(lambda method=part: check_method(method))  # type: ignore[misc]
        else:
            attempt(lambda part=part: elaborate(part, source, directory=directory))  # type: ignore[misc]
    return tuple(sorted(found.values(), key=lambda each: each.span.start if each.span else -1))


def _place(diagnostic: Diagnostic) -> object:
    span = diagnostic.span
    return (span.source.name, span.start) if span else (diagnostic.code, diagnostic.message)


def _parts(file: tree.File) -> Iterator[tree.File | tree.Method]:
    """Methods alone; every adapter without its clauses, and with each of them; the rest beside sound adapters.

    Of a combination every adapter alone, and how they are combined beside sound ones.
    """
    definitions = tuple(each for each in file.statements if isinstance(each, tree.Use | tree.Method))
    yield from (each for each in definitions if isinstance(each, tree.Method))
    adapters = [each for each in file.statements if isinstance(each, tree.Adapter)]
    for each in adapters:
        yield tree.File((*definitions, replace(each, clauses=())))
        for clause in each.clauses:
            yield tree.File((*definitions, replace(each, clauses=(clause,))))
    named = [each for each in file.statements if isinstance(each, tree.Adapter | tree.Combined)]
    method = tree.Call(next(iter(builtin_methods())))
    stand_ins = [tree.Adapter(each.name, method, span=each.span) for each in named]
    yield tree.File((*definitions, *stand_ins))
    sound = tuple({each.name: each for each in stand_ins}.values())
    for position, combined in enumerate(named):
        if isinstance(combined, tree.Combined):
            others = {each.name: each for each in stand_ins[:position] if each.name != combined.name}
            later = {each.name: each for each in stand_ins[position + 1 :] if each.name not in others}
            later.pop(combined.name, None)
            for name in combined.adapters:
                lone = replace(combined, adapters=(name,), options=())
                yield tree.File((*definitions, *others.values(), lone, *later.values()))
            parts = {each.id: tree.Adapter(each.id, method) for each in combined.adapters if each.id != combined.name}
            if len(parts) == len(combined.adapters):
                yield tree.File((*definitions, *parts.values(), combined))
    for statement in file.statements:
        if isinstance(statement, tree.Base):
            for entry in statement.entries:
                yield tree.File((*definitions, *sound, replace(statement, entries=(entry,))))
        elif isinstance(statement, tree.Activate):
            for term in statement.terms:
                yield tree.File((*definitions, *sound, replace(statement, terms=(term,))))
