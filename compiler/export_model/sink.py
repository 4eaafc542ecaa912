"""A file for writers in C++, which end the process where one of their own cannot be written."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def sink(path: Path) -> Iterator[Any]:
    """A file to write to that never fails while it is written; OSError is raised when that is done."""
    with path.open("wb") as file:
        taking = _Sink(file)
        yield taking
        if taking.failure is not None:
            raise taking.failure


class _Sink(io.RawIOBase):
    """Writes until something fails, and takes the rest for nothing."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.failure: OSError | None = None

    def writable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It says so, since torch asks; only to the start, when all is written, does anyone go."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Done in name only."""
        return offset

    def write(self, data: Any) -> int:
        """Take all of it."""
        if self.failure is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes
