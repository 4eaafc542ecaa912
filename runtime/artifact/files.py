"""The files of an artifact: that they are those which were written, and that none is outside. Needs no torch."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from peftc.grammar.diagnostics import CheckpointError, fail
from peftc.runtime.artifact.manifest import AGAIN, FileFacts


def check_files(directory: Path, files: Mapping[str, FileFacts], *, digests: bool) -> None:
    """Check that every file is in the directory and has its size, and (`digests`) its content.

    Raises:
        CheckpointError: one is missing, cannot be read or was changed (E604), or is a link that leaves the directory
            (E605).
    """
    home = directory.resolve()
    for name, facts in files.items():
        where = str(directory / name)
        if not (directory / name).resolve().is_relative_to(home):
            message = "this is a link that leaves the artifact's directory"
            fail(CheckpointError, "E605", message, help="do not use this artifact: export it yourself", where=where)
        try:
            size = os.stat(directory / name).st_size
        except OSError as error:
            message = f"a file of the artifact cannot be read: {error.strerror or error}"
            fail(CheckpointError, "E604", message, help=AGAIN, where=where)
        if size != facts.bytes:
            message = f"the file has {size:,} bytes, {facts.bytes:,} were written: it is damaged or was changed"
            fail(CheckpointError, "E604", message, help=AGAIN, where=where)
    if not digests:
        return
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        found = dict(zip(files, pool.map(lambda name: _digest(directory / name), files), strict=True))
    for name, facts in files.items():
        if found[name] != facts.sha256:
            message = "the content is not what was written: the file is damaged or was changed"
            fail(CheckpointError, "E604", message, help=AGAIN, where=str(directory / name))


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        message = f"a file of the artifact cannot be read: {error.strerror or error}"
        fail(CheckpointError, "E604", message, help=AGAIN, where=str(path))
