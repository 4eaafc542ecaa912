"""Keeps libraries quiet that tell of their own affairs while they work."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_ERROR = re.compile(r"\berror:", re.IGNORECASE)  # of a compiler, not the name of an exception


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, and without what is logged below an error."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(max(before, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(before)


def first_error(error: BaseException) -> str:
    """The line of a library's message, often a whole log, that says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = (line for line in lines if _ERROR.search(line))
    return next(telling, lines[0] if lines else type(error).__name__)
