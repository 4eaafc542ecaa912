"""Cases that repeat on another model what the others show: run by `pytest -m matrix`, and not by a plain `pytest`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def wide(cases: Iterable[Any], always: Collection[str]) -> list[Any]:
    """The cases for `parametrize`, those whose name (the first of several values) is not in `always` marked."""
    return [_case(each, str(each[0] if isinstance(each, tuple) else each) in always) for each in cases]


def _case(case: Any, always: bool) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return case if always else pytest.param(*values, marks=pytest.mark.matrix)
