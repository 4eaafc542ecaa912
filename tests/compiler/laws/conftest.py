import pytest

from peftc.compiler.pipeline import managed


@pytest.fixture(autouse=True)
def full_verification(monkeypatch):
    """Every value of every graph is worked out anew after each pass: see CONTRIBUTING, "Read a failing verify"."""
    monkeypatch.setenv(managed.VERIFY, "full")
