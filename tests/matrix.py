"""Cases that show on another model what the others show: part of every whole run; `-m "not matrix"` leaves them out."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def wide(cases: Iterable[Any], always: Collection[str]) -> list[Any]:
    """The cases for `parametrize`, those whose name (the first of several values) is not in `always` marked."""
    return [_case(each, str(each[0] if isinstance(each, tuple) else each) in always) for each in cases]


def _case(case: Any, always: bool) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return case if always else pytest.param(*values, marks=pytest.mark.matrix)
