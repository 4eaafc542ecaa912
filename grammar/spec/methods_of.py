"""The methods a file may name: built in, its own, and those of the files it uses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peftc.grammar.diagnostics import SpecError, fail
from peftc.grammar.method.check import check_method, method_name
from peftc.grammar.method.rule import MethodRule
from peftc.grammar.source import Source
from peftc.grammar.spec.combined import WORD as COMBINE
from peftc.grammar.syntax import expression, tree
from peftc.grammar.syntax.parse import parse

Loader = Callable[[Path], Source]

MAX_FILES = 64


@dataclass
class Methods:
    """Methods by name: `builtin`, and the file's `own` with those it brings in."""

    builtin: Mapping[str, MethodRule]
    own: dict[str, MethodRule] = field(default_factory=dict)

    @property
    def known(self) -> dict[str, MethodRule]:
        """All of them."""
        return {**self.builtin, **self.own}

    def define(self, method: tree.Method) -> None:
        """Check a definition and add it. Raises SpecError; a name is defined once."""
        if method.name in self.builtin:
            message = f"'{method.name}' is a built-in method and cannot be redefined"
            fail(SpecError, "E131", message, method_name(method), help="give it a name of its own")
        if method.name == COMBINE:
            message = f"'{COMBINE}' makes an adapter of others and cannot be a method"
            fail(SpecError, "E131", message, method_name(method), help="give it a name of its own")
        if method.name in self.own:
            place = self.own[method.name].span
            help = f"it is defined in {place.source.name}, line {place.line}" if place else ""
            fail(SpecError, "E131", f"'{method.name}' is defined twice", method_name(method), help=help)
        self.own[method.name] = check_method(method, self.known)


def methods_of(file: tree.File, directory: Path | None, load: Loader, builtin: Mapping[str, MethodRule]) -> Methods:
    """The methods of a file in `directory` and of the files it uses, each read once. Raises SpecError (E12x, E13x)."""
    methods = Methods(builtin)
    _bring_in(file, directory, load, methods, done=set(), chain=())
    return methods


def _bring_in(
    file: tree.File, directory: Path | None, load: Loader, methods: Methods, done: set[Path], chain: tuple[Path, ...]
) -> None:
    for statement in file.statements:
        if isinstance(statement, tree.Use):
            path = _resolve(statement, directory)
            if path in chain:
                message = f"{expression.quoted(statement.path)} is being read already: the files use each other"
                fail(SpecError, "E121", message, statement.span)
            if path in done:
                continue
            done.add(path)
            if len(done) > MAX_FILES:
                fail(SpecError, "E103", f"the files used are more than {MAX_FILES}", statement.span)
            used = parse(load(path))
            for each in used.statements:
                if not isinstance(each, tree.Use | tree.Method):
                    help = "a file that is used may hold 'method' and 'use' only"
                    fail(SpecError, "E122", "a used file only defines methods", each.span, help=help)
            _bring_in(used, path.parent, load, methods, done, (*chain, path))
        elif isinstance(statement, tree.Method):
            methods.define(statement)


def _resolve(statement: tree.Use, directory: Path | None) -> Path:
    written = expression.quoted(statement.path)
    if directory is None:
        help = "save the spec as a file, or write the method into it"
        fail(
            SpecError, "E120", f"a spec given as text has no directory to find {written} in", statement.span, help=help
        )
    if not statement.path or "\0" in statement.path:
        fail(SpecError, "E120", f"{written} is not a path", statement.span)
    if Path(statement.path).is_absolute() or statement.path[1:3] in (":\\", ":/"):
        fail(SpecError, "E120", "the path is absolute", statement.span, help="use a path relative to this file")
    try:
        root = directory.resolve()
        path = (root / statement.path).resolve()
        exists = path.is_file()
    except (OSError, RuntimeError, ValueError):
        fail(SpecError, "E120", f"{written} is not a path", statement.span)
    if not path.is_relative_to(root):
        help = "a spec uses files of its own directory and below"
        fail(SpecError, "E120", f"{written} leads out of the directory of this file", statement.span, help=help)
    if not exists:
        fail(SpecError, "E120", f"there is no file {written} in {directory}", statement.span)
    return path
