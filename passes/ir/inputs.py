"""What the inputs of a graph mean: roles, and axes with names. No pass looks at what an input is called."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from peftc.passes.ir.roles import Role, Stack

BATCH, SEQUENCE, PAST, SOURCE = "batch", "sequence", "past", "source"
"""Dimensions: rows, tokens of the call, tokens that a cache holds, tokens that an encoder reads."""

Size = int | tuple[str | int, ...]
"""A fixed size, or what it is the sum of: names of dimensions, and numbers."""

_META = "input"


@dataclass(frozen=True)
class CacheSlot:
    """Which tensor of a cache: of a layer the "key" or "value", its own or those over an encoder's output."""

    layer: int
    part: str
    cross: bool = False

    def __str__(self) -> str:
        return f"{'cross_' * self.cross}{self.layer}_{self.part}"


@dataclass(frozen=True)
class InputSpec:
    """An input of a graph.

    `name` is what callers of a program know it by. `axes` says for each axis how long it is: a number, a sum of named
    dimensions, or None where any size will do and nobody knows what of.
    """

    name: str
    role: Role = Role.OTHER
    stack: Stack = Stack.ONLY
    axes: tuple[Size | None, ...] = ()
    slot: CacheSlot | None = None

    @property
    def bound(self) -> tuple[int | None, ...]:
        """For each axis its size, if it has to be that one."""
        return tuple(size if isinstance(size, int) else None for size in self.axes)

    @property
    def is_encoded(self) -> bool:
        """Whether an encoder made it: its output, or keys and values over it."""
        return self.role == Role.ENCODED or (self.slot is not None and self.slot.cross)

    @property
    def is_own_cache(self) -> bool:
        """Whether it holds keys or values of the text itself."""
        return self.role == Role.CACHE and self.slot is not None and not self.slot.cross


def describe(node: fx.Node, spec: InputSpec) -> None:
    """Say what a placeholder is."""
    node.meta[_META] = spec


def spec_of(node: fx.Node) -> InputSpec:
    """What a placeholder is; one that nobody described is of no known use."""
    found = node.meta.get(_META)
    return found if isinstance(found, InputSpec) else InputSpec(str(node.target))


def inputs_of(graph: fx.Graph) -> dict[fx.Node, InputSpec]:
    """Every input of a graph, in order."""
    return {node: spec_of(node) for node in graph.find_nodes(op="placeholder")}


def with_role(graph: fx.Graph, role: Role, *stacks: Stack) -> Iterator[fx.Node]:
    """The inputs of a role, of one of these stacks (of any, where none is said)."""
    for node, spec in inputs_of(graph).items():
        if spec.role == role and (not stacks or spec.stack in stacks):
            yield node


def own_cache(graph: fx.Graph) -> list[fx.Node]:
    """The inputs that hold keys and values of the text itself: of every layer the keys, then the values."""
    return [node for node, spec in inputs_of(graph).items() if spec.is_own_cache]


def sizes_by(values: Mapping[str, int], size: Size) -> int:
    """A size where every dimension is known."""
    return size if isinstance(size, int) else sum(each if isinstance(each, int) else values[each] for each in size)
