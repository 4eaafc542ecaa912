"""Memory that was freed, given back to the system: packing a weight frees several times what it keeps."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

PAUSE = 0.02  # seconds


def release() -> None:
    """Give back what glibc's allocator keeps for later; nothing where the allocator is another one."""
    trim = _trim()
    if trim is not None:
        trim(0)


@contextmanager
def releasing() -> Iterator[None]:
    """Do so again and again, from a thread of its own, while the block runs."""
    done = Event()

    def work() -> None:
        while not done.wait(PAUSE):
            release()

    thread = Thread(target=work, name="peftc-release", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        release()


def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no library of one's own, as on Windows
        return None
    return found
