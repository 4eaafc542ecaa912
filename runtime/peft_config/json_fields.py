"""Typed access to the fields of a JSON object, with what is wrong collected."""

import json
import re
from collections.abc import Iterable, Mapping

from peftc.grammar.diagnostics import Diagnostic, did_you_mean


class FieldReader:
    """Typed access to a configuration; `problems` and `warnings` collect, so that one run reports everything.

    Fields that nobody knows are problems if `strict`, and a warning otherwise.
    """

    def __init__(self, config: Mapping[str, object], where: str, *, strict: bool = True):
        self.config = config
        self.where = where
        self.strict = strict
        self.problems: list[Diagnostic] = []
        self.warnings: list[str] = []

    def problem(self, code: str, message: str, help: str = "") -> None:
        """Collect one problem."""
        self.problems.append(Diagnostic(code, message, help=help, where=self.where))

    def unknown(self, names: Iterable[str], known: Iterable[str]) -> None:
        """Collect that nobody knows these fields."""
        near = {name: did_you_mean(name, known) for name in names}
        if self.strict:
            for name, help in near.items():
                help = help or "remove the field if the adapter does not depend on it"
                self.problem("E323", f"unknown field '{name}' = {shown(self.config[name])}", help)
        elif near:
            told = [f"'{name}' = {shown(self.config[name])}{help and f' ({help})'}" for name, help in near.items()]
            self.warnings.append(
                f"{self.where}: fields that are not known here were left unread: {', '.join(told)}; if the adapter "
                "depends on one, its outputs are not those it was trained to have (strict=True refuses such fields)"
            )

    def mistyped(self, name: str, expected: str) -> None:
        """Collect that a field's value is not what it should be."""
        self.problem("E321", f"field '{name}' = {shown(self.config[name])} is not {expected}")

    def get(self, name: str, kind: type | tuple[type, ...], expected: str) -> object:
        """The field's value; None when absent, null, or (collected) of another type."""
        value = self.config.get(name)
        if value is None or isinstance(value, kind):
            return value
        self.mistyped(name, expected)
        return None

    def text(self, name: str) -> str | None:
        """A field that is a text."""
        value = self.get(name, str, "a text")
        return value if isinstance(value, str) else None

    def table(self, name: str) -> Mapping[str, object] | None:
        """A field that is an object."""
        value = self.get(name, dict, "an object")
        return value if isinstance(value, dict) else None

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that is a list of texts; empty when absent."""
        value = self.get(name, list, "a list of texts")
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return tuple(value)
        if value is not None:
            self.mistyped(name, "a list of texts")
        return ()

    def text_or_texts(self, name: str) -> str | tuple[str, ...] | None:
        """A field that is a text or a list of texts."""
        value = self.config.get(name)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return tuple(value)
        self.mistyped(name, "a text or a list of texts")
        return None

    def pattern(self, name: str, text: str) -> bool:
        """Whether a text is a regular expression; if not, that is reported."""
        try:
            re.compile(text)
        except re.error as error:
            self.problem("E321", f"field '{name}': {text!r} is not a regular expression: {error}")
            return False
        return True


def shown(value: object) -> str:
    """A value as JSON has it, shortened."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."
