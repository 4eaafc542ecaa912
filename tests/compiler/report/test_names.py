import pytest

from peftc.compiler.report.names import collapse


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a.0.q", "a.0.v", "a.1.q", "a.1.v"], ("a[0..2].{q, v}",)),
        (["lm_head"], ("lm_head",)),
        (["h.0.x", "h.2.x", "h.3.x"], ("h[0, 2..4].x",)),
        (["b.0.c.0.x", "b.0.c.1.x", "b.2.c.0.x"], ("b[0].c[0..2].x", "b[2].c[0].x")),
        (["0", "2"], ("{0, 2}",)),
        (["a.0", "a.1"], ("a[0..2]",)),
        ([], ()),
    ],
)
def test_collapse(names, shown):
    assert collapse(names) == shown
