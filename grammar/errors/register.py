"""What the codes of diagnostics mean, read from the files beside this one when somebody asks."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

from peftc.grammar.diagnostics import UsageError, fail, nearest


@dataclass(frozen=True)
class Family:
    """Codes that begin alike: the file they are in, and what they are about."""

    start: str
    file: str
    title: str


FAMILIES = (
    Family("E1", "language.toml", "The language"),
    Family("E2", "specs.toml", "A spec and a model"),
    Family("E3", "checkpoints.toml", "Checkpoints"),
    Family("E4", "models.toml", "Models"),
    Family("E5", "use.toml", "Use"),
    Family("E6", "artifacts.toml", "Export and artifacts"),
)


@dataclass(frozen=True)
class Entry:
    """One code. `says` is a message as it may be met; `spec`, where there is one, a text that is refused with it."""

    code: str
    says: str
    means: str
    mend: str
    spec: str = ""


@cache
def register() -> Mapping[str, Entry]:
    """Every code's entry, in the order of the codes."""
    entries = {}
    for family in FAMILIES:
        text = resources.files("peftc.grammar.errors").joinpath(family.file).read_text(encoding="utf-8")
        for code, fields in tomllib.loads(text).items():
            entries[code] = Entry(code, **fields)
    return MappingProxyType(dict(sorted(entries.items())))


def entry(code: str) -> Entry:
    """The entry of a code, in capitals or not. Raises UsageError with codes that are near."""
    known = register()
    wanted = code.strip().upper()
    if wanted not in known:
        close = nearest(wanted, known) or tuple(known)[:1]
        fail(UsageError, "E579", f"there is no error code {code!r}", help=f"near it: {', '.join(close)}")
    return known[wanted]
