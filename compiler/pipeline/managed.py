"""Runs pipelines as whoever debugs them asks: verified in full, written to a directory, refusals gathered."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import fx

from peftc.passes.ir import pass_manager
from peftc.passes.ir.infer import described
from peftc.passes.ir.pass_manager import Pass, Refusal, Result

DUMP = "PEFTC_DUMP_GRAPHS"
"""The environment variable that names a directory for the graph after each pass."""

VERIFY = "PEFTC_VERIFY"
"""The environment variable that, at `full`, has every value worked out anew after each pass."""

_DIRECTORY: ContextVar[Path | None] = ContextVar("directory", default=None)
_REFUSALS: ContextVar[dict[Refusal, None] | None] = ContextVar("refusals", default=None)


def run(subject: Any, pipeline: Sequence[Pass]) -> Result:
    """Run passes as `pass_manager.run`. Raises VerifyError, naming the pass that broke the graph."""
    directory = _DIRECTORY.get() or (Path(os.environ[DUMP]) if os.environ.get(DUMP) else None)
    text = pass_manager.text(pipeline)

    def write(name: str, graph: fx.Graph) -> None:
        if directory is not None:
            _write(directory, name, text, graph)

    result = pass_manager.run(subject, pipeline, full=os.environ.get(VERIFY) == "full", watch=write)
    gathered = _REFUSALS.get()
    if gathered is not None:
        gathered |= dict.fromkeys(result.refusals)
    return result


@contextmanager
def dump_graphs(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, the graph is written to a directory after each pass, as with PEFTC_DUMP_GRAPHS."""
    token = _DIRECTORY.set(Path(directory))
    try:
        yield
    finally:
        _DIRECTORY.reset(token)


@contextmanager
def gathered_refusals() -> Iterator[dict[Refusal, None]]:
    """What passes refuse inside, each once and in order."""
    found: dict[Refusal, None] = {}
    token = _REFUSALS.set(found)
    try:
        yield found
    finally:
        _REFUSALS.reset(token)


def _write(directory: Path, name: str, pipeline: str, graph: fx.Graph) -> None:
    """`0007-insert-delta.txt`: the pipeline, and every node with its value and whose it is."""
    directory.mkdir(parents=True, exist_ok=True)
    number = len(list(directory.glob("[0-9]*-*.txt")))
    lines = [f"# {line}{'   <- after this' if line.startswith(f'{name}(') else ''}" for line in pipeline.splitlines()]
    lines += [_line(node) for node in graph.nodes]
    (directory / f"{number:04}-{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(node: fx.Node) -> str:
    value = f"  {described(node.meta['val'])}" if "val" in node.meta and node.op != "output" else ""
    origin = f"  # {node.meta['peftc']}" if "peftc" in node.meta else ""
    return f"{node.format_node() or node}{value}{origin}"
