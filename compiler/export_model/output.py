"""An output directory that appears complete or not at all, and never at the cost of what it did not make."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peftc.grammar.diagnostics import UsageError, fail

MANIFEST = "manifest.json"
FORMAT = 1
_MARK = "peftc_build"


def check_target(directory: Path, *, force: bool = False) -> None:
    """Refuse a directory that cannot be replaced by a build.

    Raises:
        UsageError: it is a file, or holds anything but an unchanged earlier build and `force` is False, or it holds
            the current directory or the home directory.
    """
    where = str(directory)
    if directory.exists() and not directory.is_dir():
        fail(UsageError, "E551", "this is a file, not a directory", where=where)
    real = directory.resolve()
    for kept in (Path.cwd(), Path.home()):
        if kept.resolve().is_relative_to(real):
            fail(UsageError, "E551", f"this would replace {kept}", help="give a directory of its own", where=where)
    if force or not directory.is_dir():
        return
    foreign = _foreign(directory)
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        fail(
            UsageError,
            "E551",
            f"the directory holds what no earlier build put there: {shown}",
            help="choose another directory, or replace it with --force (force=True)",
            where=where,
        )


@contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """A temporary sibling to fill; it takes the directory's place at the end, or vanishes if anything goes wrong.

    Raises:
        UsageError: the place cannot be written to.
    """
    target = directory.resolve()
    mark = secrets.token_hex(4)
    temporary, old = (target.with_name(f".{target.name}.{mark}.{kind}") for kind in ("new", "old"))
    made = [each for each in (target.parent, *target.parent.parents) if not each.exists()]
    done = False
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        done = True
    except OSError as error:
        where = str(error.filename or directory).replace(str(temporary), str(directory))
        fail(UsageError, "E550", f"cannot write: {error.strerror or error}", where=where)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)
        if not done:
            for each in made:
                with suppress(OSError):
                    each.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a single file; it appears whole or not at all, and keeps the mode of one that was there.

    Raises:
        UsageError: it cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for bytes."""
    with moved_into(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def moved_into(path: Path) -> Iterator[Path]:
    """A temporary sibling to write; it takes the file's place at the end, or vanishes if anything goes wrong.

    Raises:
        UsageError: it cannot be written.
    """
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as error:
        fail(UsageError, "E550", f"cannot write: {error.strerror or error}", where=str(path))
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def seal(directory: Path, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Write manifest.json: the facts and every file with its size and digest. Returns the files' names, sorted."""
    names = _files(directory)
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        files = dict(zip(names, pool.map(lambda name: digest(directory / name), names), strict=True))
    manifest = {_MARK: FORMAT, **facts, "files": files}
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")
    return tuple(sorted([*files, MANIFEST]))


def is_build(directory: Path) -> bool:
    """Whether a directory was written by `peftc compile`."""
    return bool(_manifest(directory))


def _manifest(directory: Path) -> dict[str, Any]:
    try:
        value = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) and _MARK in value and isinstance(value.get("files"), dict) else {}


def _foreign(directory: Path) -> list[str]:
    """Files that no build wrote, or that were changed since."""
    known = _manifest(directory).get("files", {})
    present = [each for each in _files(directory) if not (known and each == MANIFEST)]
    return [each for each in present if each not in known or known[each] != digest(directory / each)]


def _files(directory: Path) -> list[str]:
    found = (each for each in directory.rglob("*") if not each.is_dir() or each.is_symlink())
    return sorted(each.relative_to(directory).as_posix() for each in found)


def digest(path: Path) -> dict[str, object]:
    """A file's size and sha256, as manifests have them; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError:
        return {}
