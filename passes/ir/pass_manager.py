"""Runs passes in order and verifies the graph after each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import fx

from peftc.passes.ir.verify import Legal, verify


@dataclass(frozen=True)
class Change:
    """What a pass did: nodes made and nodes removed."""

    made: int = 0
    removed: int = 0


@dataclass(frozen=True)
class Miss:
    """Why a pass leaves something as it is, and at which node; falsy."""

    reason: str
    node: fx.Node

    def __bool__(self) -> bool:
        return False


class Pass(Protocol):
    """A rewrite. Frozen data; the first line of its docstring is its law."""

    name: ClassVar[str]

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place; running twice must change nothing the second time."""
        ...

    def legal(self, node: fx.Node) -> bool:
        """Whether a node may be in the graph after this pass."""
        ...


def run(graph: fx.Graph, pipeline: Sequence[Pass]) -> dict[str, Change]:
    """Run the passes on the graph in place. Raises VerifyError, naming the pass that broke the graph."""
    changes: dict[str, Change] = {}
    for each in pipeline:
        changes[each.name] = each.run(graph)
        legal: Legal = each.legal
        verify(graph, after=each.name, legal=legal)
    return changes
