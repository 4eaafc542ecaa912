"""Texts that a person should read before they change: files under tests/golden, whole or in sections."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent / "golden"
_HEAD = "=== "  # stands before the name of a section


@dataclass(frozen=True)
class Golden:
    """`golden(path, text)`: the text is what the file under tests/golden holds, or its section of that name.

    With `update` it is written there instead. Sections are kept in the order of their names, so that a file does not
    depend on which test ran first.
    """

    update: bool
    root: Path = ROOT

    def __call__(self, path: str, text: str, section: str = "") -> None:
        """Compare, or write."""
        file = self.root / path
        if self.update:
            self._write(file, text if not section else _joined({**self._sections(file), section: text}))
            return
        assert file.exists(), f"{file} is missing; run pytest with --update-golden and read it"
        if not section:
            assert text == file.read_text(encoding="utf-8")
            return
        held = self._sections(file)
        assert section in held, f"{file} has no section '{section}'; run pytest with --update-golden and read it"
        assert text == held[section]

    def holds(self, path: str, sections: Collection[str]) -> None:
        """The file has these sections and no others; an update takes away what no test writes any more."""
        file = self.root / path
        held = self._sections(file)
        if self.update:
            self._write(file, _joined({name: text for name, text in held.items() if name in sections}))
        else:
            assert set(held) == set(sections)

    def _sections(self, file: Path) -> dict[str, str]:
        if not file.exists():
            return {}
        _, *parts = ("\n" + file.read_text(encoding="utf-8")).split(f"\n{_HEAD}")
        named = (part.partition("\n") for part in parts)
        return {name: text.removesuffix("\n") + "\n" for name, _, text in named}

    def _write(self, file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def _joined(sections: dict[str, str]) -> str:
    for name, text in sections.items():
        assert text.endswith("\n"), name
        assert not f"\n{text}".count(f"\n{_HEAD}"), f"{name}: a line of the text looks like the head of a section"
    return "\n".join(f"{_HEAD}{name}\n{sections[name]}" for name in sorted(sections))
