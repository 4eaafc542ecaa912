"""One option and one fixture for texts that a person should read before they change; threads and garbage of runs."""

import gc
import os

import pytest

from tests.golden_files import Golden

# pytest-xdist runs a process for each core, and torch would start a thread for each core in every one of them. This is
# read before torch is.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """What was imported is never garbage, and graphs are made of many small objects: looking through all of them time
    and again takes a fifth of a run."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the files under tests/golden")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(path, text, section)`: the text is what lies under tests/golden; --update-golden writes it there."""
    return Golden(update=request.config.getoption("--update-golden"))
