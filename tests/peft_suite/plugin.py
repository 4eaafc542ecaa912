"""What pytest does with PEFT's tests: nothing is asked of the network, and what comes of each is kept."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.peft_release import peft_as_oracle

MARKERS = ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes")
_AS_MEANT = ExitStack()
SHOWN = 600  # characters of a message


class _Known(dict[str, int]):
    """Says of every model that it was fetched before, so that it is looked for in the cache alone."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, required=True)
    parser.addoption("--every", type=int, default=1)


def pytest_configure(config: pytest.Config) -> None:
    _AS_MEANT.enter_context(peft_as_oracle())
    for name in MARKERS:
        config.addinivalue_line("markers", name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    file = config.getoption("--results")
    known = {row["test"] for row in rows(file)} if file.exists() else set()
    items[:] = [each for each in items[:: config.getoption("--every")] if each.nodeid not in known]
    for name, module in sys.modules.items():
        if name.endswith(".testing_utils"):
            module._HUB_MODEL_ACCESSES = _Known()  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.when == "call" or not report.passed:
        row: dict[str, Any] = {"test": item.nodeid, "outcome": report.outcome}
        if call.excinfo is not None and report.failed:
            row |= _told(call.excinfo)
        with item.config.getoption("--results").open("a") as out:
            out.write(json.dumps(row) + "\n")
    return report


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """What came of the tests."""
    for line in file.read_text().splitlines():
        yield json.loads(line)


def _told(raised: pytest.ExceptionInfo[BaseException]) -> dict[str, Any]:
    frames = [each for each in raised.traceback if "peft_tests" in str(each.path)]
    lines = [f"{Path(each.path).name}: {str(each.statement).strip()}" for each in frames]
    return {"error": raised.typename, "message": str(raised.value)[:SHOWN], "line": lines[-1] if lines else ""}
