import pytest


@pytest.fixture(autouse=True, scope="module")
def shared_traces():
    """These tests are about tracing: each traces itself."""
