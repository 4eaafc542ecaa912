"""The picture as data: what is drawn, and which nodes of the graph each drawing stands for."""

from dataclasses import dataclass

ROOT = ""
"""The cluster of the whole model, which has no frame."""


@dataclass(frozen=True)
class Weight:
    """A tensor of the base that an operator reads. `tied` are the other names it is read by in this graph."""

    name: str
    shape: str
    tied: tuple[str, ...] = ()
    status: str = "kept"


@dataclass(frozen=True)
class Node:
    """One drawn node.

    `kind` is one of input, output, operator, norm, activation, attention, add, multiply, plumbing (masks, positions,
    rotations), weight (one that adapters read), adapter, join (where adapters meet the base), widened (a mask,
    positions or ids made to fit what adapters put in front).
    `members` are the fx nodes it stands for, `operators` the kinds of operator among them, and `folded` the fx nodes
    of the folded layers that it stands for besides. `position` is an adapter's place among the active ones.
    `status` is kept, added, removed or context.
    """

    id: str
    kind: str
    title: str
    lines: tuple[str, ...] = ()
    module: str = ""
    cluster: str = ROOT
    shape: str = ""
    site: str = ""
    position: int | None = None
    weights: tuple[Weight, ...] = ()
    operators: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    status: str = "kept"


@dataclass(frozen=True)
class Edge:
    """A tensor that flows. `kind` is flow, quiet (masks and positions), returned (a cache the model gives back),
    through (a path through nodes that are not shown) or removed."""

    source: str
    target: str
    kind: str = "flow"
    shape: str = ""


@dataclass(frozen=True)
class Fold:
    """A run of identical layers drawn once: the module paths of all of them, the drawn one first."""

    paths: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many layers the drawn one stands for."""
        return len(self.paths)


@dataclass(frozen=True)
class Cluster:
    """A module with more than one drawn node. `path` tells calls of one module apart, `module` does not."""

    path: str
    parent: str
    module: str
    label: str
    type: str = ""
    fold: Fold | None = None


@dataclass(frozen=True)
class Picture:
    """A graph as it is drawn. Clusters, nodes and edges stand in the order of the graph."""

    clusters: tuple[Cluster, ...]
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    names: tuple[str, ...] = ()  # of the adapters, by position

    def adapter_name(self, position: int) -> str:
        """How an adapter is called here."""
        return self.names[position] if position < len(self.names) else f"adapter {position}"
