import sys
from pathlib import Path

import pytest

from tests.compiler.commands.cli_help import SPEC, write_model
from tests.shared_traces import shared_traces  # noqa: F401  (a fixture of every test here)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current directory: a spec, a tiny Llama's config, importable factories."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.adapter").write_text(SPEC)
    write_model(tmp_path / "tiny")
    (tmp_path / "factories.py").write_text((Path(__file__).parent / "factories.py").read_text())
    (tmp_path / "net.adapter").write_text("adapter a = lora(rank = 2) { on first, second }\n")
    yield tmp_path
    sys.modules.pop("factories", None)
