"""PEFT's tests, with `peftc.peft` in the place of PEFT: `python -m tests.peft_suite.prepared TESTS SUITES HUB`."""

import ast
import shutil
import sys
from pathlib import Path

from peftc import peft as public
from tests.peft_suite.models import make

BEHIND = "tests.peft_suite.behind"


def redirected(source: str, ours: frozenset[str]) -> str:
    """A module's text that imports PEFT's public names from `BEHIND`; every other line stays where it is.

    `ours` are the names that are public here: they are taken from there whichever module of PEFT's has them.
    """
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        made = _imports(node, ours)
        if made:
            assert isinstance(node, ast.Import | ast.ImportFrom)
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            lines[first:last] = [" " * node.col_offset + made, *[""] * (last - first - 1)]
    return "\n".join(lines) + "\n"


def _imports(node: ast.AST, ours: frozenset[str]) -> str:
    if isinstance(node, ast.Import):
        if [each.name for each in node.names] == ["peft"]:
            return f"import {BEHIND} as {node.names[0].asname or 'peft'}"
        return ""
    if not isinstance(node, ast.ImportFrom) or node.level or (node.module or "").partition(".")[0] != "peft":
        return ""
    assert node.module is not None
    here = [each for each in node.names if node.module == "peft" or each.name in ours]
    parts = [(BEHIND, here), (node.module, [each for each in node.names if each not in here])]
    return "; ".join(f"from {module} import {', '.join(map(ast.unparse, names))}" for module, names in parts if names)


def prepare(source: Path, target: Path, ours: frozenset[str] | None) -> None:
    """Copy the tests into a package `target`, anew, for `peftc.peft` if `ours` are said, else for PEFT."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / "__init__.py").touch()
    for file in source.glob("*.py"):
        text = file.read_text()
        (target / file.name).write_text(text if ours is None else redirected(text, ours))


if __name__ == "__main__":
    tests, suites, hub = map(Path, sys.argv[1:])
    prepare(tests, suites / "peft" / "peft_tests", None)
    prepare(tests, suites / "peftc" / "peft_tests", frozenset(public.__all__))
    make(hub)
