"""Write docs/errors.md from the register of error codes in grammar/errors."""

from collections.abc import Iterator
from pathlib import Path

from peftc.grammar.errors.register import FAMILIES, Entry, register

PAGE = Path(__file__).parent / "errors.md"
HEAD = """# Errors

Every message of peftc has a code, and a code has one meaning. `peftc explain E201` tells the same of one. Made from
`grammar/errors` by `docs/make_errors.py`."""


def page() -> str:
    """The whole page."""
    parts = [HEAD, "\n".join(f"- [{family.start}xx: {family.title}](#{_anchor(family.title)})" for family in FAMILIES)]
    for family in FAMILIES:
        parts.append(f"## {family.title}")
        for entry in register().values():
            if entry.code.startswith(family.start):
                parts += described(entry)
    return "\n\n".join(parts) + "\n"


def described(entry: Entry) -> Iterator[str]:
    """One code: a message, what it means, how it is mended, and a spec that is refused with it."""
    yield f"### {entry.code}"
    yield f"```text\nerror[{entry.code}]: {entry.says}\n```"
    yield entry.means
    yield f"**Mend it.** {entry.mend}"
    if entry.spec:
        yield f"```text\n{entry.spec}\n```"


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
