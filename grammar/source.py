"""Text with a name, and places in it."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Source:
    """A text and the name errors call it by (a path, or `<spec>` for text given directly)."""

    name: str
    text: str

    @cached_property
    def lines(self) -> tuple[str, ...]:
        """The lines, without their ends; never empty."""
        return tuple(self.text.split("\n"))


@dataclass(frozen=True)
class Span:
    """Half-open range of character offsets into a source."""

    source: Source
    start: int
    end: int

    @property
    def line(self) -> int:
        """1-based line of the first character."""
        return self.source.text.count("\n", 0, self.start) + 1

    @property
    def column(self) -> int:
        """1-based column of the first character, in characters."""
        return self.start - (self.source.text.rfind("\n", 0, self.start) + 1) + 1

    @property
    def text(self) -> str:
        """The characters spanned."""
        return self.source.text[self.start : self.end]
