"""Reading `.adapter` files from disk."""

import os
from pathlib import Path

from peftc.grammar.diagnostics import SpecError, fail
from peftc.grammar.source import Source

MAX_BYTES = 1 << 20


def load_source(path: str | os.PathLike[str]) -> Source:
    """The text of a file, named by its path. Raises SpecError when it cannot be read as a spec."""
    name = os.fspath(path)
    try:
        with Path(name).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        fail(SpecError, "E101", "there is no such file", where=name)
    except IsADirectoryError:
        fail(SpecError, "E101", "this is a directory, not a file", where=name)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        fail(SpecError, "E101", f"the file cannot be read: {reason}", where=name)
    if len(content) > MAX_BYTES:
        fail(SpecError, "E103", "the file is larger than 1 MiB, which no spec needs to be", where=name)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        fail(
            SpecError,
            "E102",
            f"line {line} is not UTF-8 text (byte 0x{content[error.start]:02x} at offset {error.start})",
            where=name,
            help="save the file as UTF-8",
        )
    return Source(name, text.replace("\r\n", "\n"))
