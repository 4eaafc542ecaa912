"""Typed access to the fields of a manifest. Needs no torch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeGuard

from peftc.grammar.diagnostics import CheckpointError, fail


class Fields:
    """An object in a manifest. What is not of the expected type is a CheckpointError (E603) that names the field."""

    def __init__(self, value: Mapping[str, Any], *, where: str, path: str = ""):
        self.value, self.where, self.path = value, where, path

    def wrong(self, name: str, expected: str) -> NoReturn:
        """Raise that the field is not what it should be, or that it is not there."""
        full = f"{self.path}.{name}" if self.path else name
        missing = " (it is missing)" if name not in self.value else ""
        fail(
            CheckpointError,
            "E603",
            f"manifest field '{full}' is not {expected}{missing}",
            help="export the model again",
            where=self.where,
        )

    def text(self, name: str) -> str:
        """A field that is a text."""
        value = self.value.get(name)
        return value if isinstance(value, str) else self.wrong(name, "a text")

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """A field that is one of some texts."""
        value = self.text(name)
        return value if value in choices else self.wrong(name, f"one of {', '.join(choices)}")

    def truth(self, name: str) -> bool:
        """A field that is true or false."""
        value = self.value.get(name)
        return value if isinstance(value, bool) else self.wrong(name, "true or false")

    def number(self, name: str) -> int:
        """A field that is a whole number of at least 0."""
        value = self.value.get(name)
        return value if _is_number(value) else self.wrong(name, "a whole number")

    def optional_number(self, name: str) -> int | None:
        """As `number`, or null."""
        return None if self.value.get(name) is None else self.number(name)

    def numbers(self, name: str) -> tuple[int, ...]:
        """A field that is a list of whole numbers."""
        value = self.value.get(name)
        if not isinstance(value, list) or not all(map(_is_number, value)):
            self.wrong(name, "a list of whole numbers")
        return tuple(value)

    def texts(self, name: str, *, optional: bool = False) -> tuple[str, ...]:
        """A field that is a list of texts; empty where it is optional and not there."""
        value = self.value.get(name)
        if value is None and optional:
            return ()
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            self.wrong(name, "a list of texts")
        return tuple(value)

    def table(self, name: str, *, optional: bool = False, empty: bool = True) -> "Fields":
        """A field that is an object; an empty one where it is optional and null or not there."""
        value = self.value.get(name)
        if value is None and optional:
            value = {}
        if not isinstance(value, dict) or not (value or empty):
            self.wrong(name, "an object" if empty else "an object with something in it")
        return Fields(value, where=self.where, path=f"{self.path}.{name}" if self.path else name)

    def tables(self) -> Iterator[tuple[str, "Fields"]]:
        """Every field, each an object."""
        for name in self.value:
            yield name, self.table(name)

    def list_of_tables(self, name: str) -> list["Fields"]:
        """A field that is a list of objects."""
        value = self.value.get(name)
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            self.wrong(name, "a list of objects")
        path = f"{self.path}.{name}" if self.path else name
        return [Fields(each, where=self.where, path=f"{path}[{index}]") for index, each in enumerate(value)]


def _is_number(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
