"""Which releases of other libraries peftc was tested with; a newer one is said once, and used all the same.

`pyproject.toml` has floors and no ceilings: a release that nobody has tried is more often good than not, and a cap
would take away what a user has installed. So it runs, and who meets a wrong result knows where to look first.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

Release = tuple[int, int]


class UntestedVersionWarning(UserWarning):
    """A library is newer than any that peftc was tested with."""


@dataclass(frozen=True)
class Library:
    """A library, and the oldest and newest minor release that all tests pass with."""

    name: str
    oldest: Release
    newest: Release


# Every release here was run through the tests. `oldest` is the floor in pyproject.toml, which a test compares.
TESTED = (
    Library("torch", (2, 11), (2, 14)),
    Library("transformers", (5, 23), (5, 24)),
    Library("peft", (0, 21), (0, 21)),
)

# Libraries that some features need; only `peftc doctor` asks for these.
OPTIONAL = (
    Library("accelerate", (1, 10), (1, 15)),
    Library("bitsandbytes", (0, 50), (0, 50)),
    Library("torchao", (0, 18), (0, 18)),
    Library("hqq", (0, 2), (0, 2)),
    Library("onnx", (1, 19), (1, 23)),
    Library("onnxscript", (0, 6), (0, 7)),
    Library("onnxruntime", (1, 22), (1, 32)),
)


def installed(package: str) -> str | None:
    """The version that is installed, if any. Imports nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def release(text: str) -> Release | None:
    """`2.13.0+cpu` -> (2, 13); None where a version has no such form."""
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return (int(numbers[1]), int(numbers[2])) if numbers else None


def untested(installed: Callable[[str], str | None] = installed) -> tuple[str, ...]:
    """A sentence for every library that is newer than tested."""
    sentences = []
    for library in TESTED:
        found = installed(library.name)
        number = release(found) if found else None
        if number is not None and number > library.newest:
            newest = ".".join(map(str, library.newest))
            sentences.append(f"{library.name} {found} is newer than what peftc was tested with (up to {newest})")
    return tuple(sentences)


@cache
def warn_if_untested() -> None:
    """Warn of what is newer than tested, once in a process."""
    sentences = untested()
    if sentences:
        told = "; ".join(sentences)
        warnings.warn(f"{told}; `peftc doctor` tells whether it works here", UntestedVersionWarning, stacklevel=4)
