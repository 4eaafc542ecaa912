"""Runs passes in order, verifies the graph after each, and keeps what they did and what they refused."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import fx

from peftc.passes.ir.emit import Origin
from peftc.passes.ir.stages import Stage
from peftc.passes.ir.verify import VerifyError, verify


@dataclass(frozen=True)
class Miss:
    """Why a pass leaves something as it is, at which node, and at which site if the node does not say; falsy."""

    reason: str
    node: fx.Node
    site: str = ""

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class Change:
    """What a pass did: nodes made and nodes removed, and what it refused.

    `subject` is what the passes after it work on, where that is another: a lifted graph. `prologue` is a graph that the
    pass has taken out.
    """

    made: int = 0
    removed: int = 0
    misses: tuple[Miss, ...] = field(default=(), compare=False)
    subject: Any = field(default=None, compare=False)
    prologue: fx.Graph | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Refusal:
    """A miss as it is kept: the pass, the site (or the node, where it is no adapter's), and why. No node, no graph."""

    made_by: str
    site: str
    node: str
    reason: str


@dataclass(frozen=True)
class Result:
    """What a pipeline left: its subject, what each pass changed, and all that was refused, each once."""

    subject: Any
    changes: dict[str, Change]
    refusals: tuple[Refusal, ...]


class Pass(Protocol):
    """A rewrite. Frozen data; the first line of its docstring is its law; `leaves` is the stage of what it leaves."""

    name: ClassVar[str]
    leaves: ClassVar[Stage]

    def run(self, subject: Any, /) -> Change:
        """Rewrite in place; running twice must change nothing the second time.

        The subject is a graph, or has one: what is lifted has its tensors beside it.
        """
        ...


@runtime_checkable
class Removing(Protocol):
    """A pass after which some nodes are gone that the stage would allow."""

    def removes(self, node: fx.Node) -> bool:
        """Whether this is one of them."""
        ...


Watch = Callable[[str, fx.Graph], None]
"""Is shown the graph after each pass, with the pass's name, before it is verified."""


def run(subject: Any, pipeline: Sequence[Pass], *, full: bool = False, watch: Watch | None = None) -> Result:
    """Run the passes in place. Raises VerifyError, naming the pass that broke the graph.

    With `full` every value is worked out anew after each pass, and not only where something changed.
    """
    with _apart():
        return _run(subject, pipeline, full, watch)


def _run(subject: Any, pipeline: Sequence[Pass], full: bool, watch: Watch | None) -> Result:
    changes: dict[str, Change] = {}
    refusals: dict[Refusal, None] = {}
    for each in pipeline:
        change = each.run(subject)
        subject = subject if change.subject is None else change.subject
        if watch is not None:
            watch(each.name, graph_of(subject))
        for graph in (graph_of(subject), change.prologue):
            if graph is not None:
                check(graph, each, full=full)
        changes[each.name] = change
        refusals |= dict.fromkeys(_kept(each.name, change.misses))
    return Result(subject, changes, tuple(refusals))


def check(graph: fx.Graph, after: Pass, *, full: bool = False) -> None:
    """Raise VerifyError unless the graph is what this pass may leave."""
    verify(graph, after=after.name, stage=after.leaves, full=full)
    if isinstance(after, Removing):
        for node in graph.nodes:
            if after.removes(node):
                raise VerifyError(after.name, f"node {node} ({node.target}) is what this pass removes", graph)


@contextmanager
def _apart() -> Iterator[None]:
    """Values are worked out whatever the caller's mode, as traces are: under autocast an operator gives other types."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", torch.accelerator.current_accelerator() or "cpu"):
            kind = torch.device(device).type
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def graph_of(subject: Any) -> fx.Graph:
    """The graph of what a pass works on."""
    graph = subject if isinstance(subject, fx.Graph) else subject.graph
    assert isinstance(graph, fx.Graph)
    return graph


def text(pipeline: Iterable[Pass]) -> str:
    """A pipeline, a pass a line, with those of its fields that are plain values: `clean(keep_casts=False)`."""
    return "\n".join(f"{each.name}({', '.join(_plain(each))})" for each in pipeline)


def _plain(each: Any) -> list[str]:
    values = ((one.name, getattr(each, one.name)) for one in fields(each))
    return [f"{name}={_shown(value)}" for name, value in values if _is_plain(value)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list | frozenset):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def _shown(value: Any) -> str:
    return f"{{{', '.join(map(repr, sorted(value)))}}}" if isinstance(value, frozenset) else repr(value)


def _kept(name: str, misses: Iterable[Miss]) -> Iterable[Refusal]:
    for miss in misses:
        origin = miss.node.meta.get("peftc")
        site = miss.site or (origin.site if isinstance(origin, Origin) else "")
        yield Refusal(name, site, miss.node.name, miss.reason)
