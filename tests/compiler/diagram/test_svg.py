"""Drawing needs graphviz, and says so."""

import shutil

import pytest

from peftc.compiler.diagram import build, to_dot, to_svg
from peftc.grammar.diagnostics import ModelError, UsageError

needs_graphviz = pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")


@needs_graphviz
def test_a_picture_is_drawn(tiny) -> None:
    drawn = to_svg(to_dot(build(tiny.after())))
    assert b"<svg" in drawn
    assert b"A 2\xc3\x974" in drawn


def test_without_graphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="E552") as caught:
        to_svg("digraph {}")
    assert "install graphviz" in caught.value.diagnostics[0].help


@needs_graphviz
def test_text_graphviz_refuses() -> None:
    with pytest.raises(ModelError, match="E431"):
        to_svg("digraph {")
