"""A graph as Python code that modules alike share, and the code bound to one of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from peftc.passes.optimize.hoist import PIECES
from peftc.runtime.execution.program import Alias, Held, HoistedConstants, Lowered, constant_name, namespace_of
from peftc.runtime.execution.segments import Namespace, python_function, writes_outside

Constants = Mapping[str, torch.Tensor | nn.Module]


@dataclass(eq=False)
class Template:
    """A lowered graph, compiled once. `bind` gives a function of the graph's inputs that reads from live modules."""

    lowered: Lowered
    constants: Constants
    _names: dict[str, tuple[str, str]] = field(default_factory=dict)  # of a namespace: owner, one leaf read of it
    _code: Callable[..., Any] | None = None
    writes: bool = False  # to what it does not make

    def __post_init__(self) -> None:
        short: dict[tuple[str, str], str] = {}
        graph = self.lowered.plain
        for node in graph.find_nodes(op="get_attr"):
            target = str(node.target)
            if target in self.constants:
                node.target = constant_name(target)
                continue
            owner, _, leaf = target.rpartition(".")
            kind = "" if owner == PIECES else leaf
            name = short.setdefault((owner, kind), f"n{len(short)}")
            self._names[name] = (owner, leaf)
            node.target = f"{name}.{leaf}"
        self.writes = writes_outside(graph)
        self._code = python_function(graph)

    def bind(self, held: Held) -> "Code":
        """The function over live modules."""
        prologue = None if self.lowered.prologue is None else _copied(self.lowered.prologue)
        pieces = None if prologue is None else HoistedConstants(prologue, held)
        root = Namespace()
        for name, (owner, leaf) in self._names.items():
            if owner == PIECES:
                assert pieces is not None
                setattr(root, name, namespace_of(pieces.values, leaf, leaf))
            else:
                where, kept = held(owner, leaf)
                setattr(root, name, namespace_of(where, leaf, kept))
        for target, value in self.constants.items():
            setattr(root, constant_name(target), value)
        assert self._code is not None
        return Code(self._code, root, pieces, self.writes)


@dataclass(frozen=True, eq=False)
class Code:
    """A function of a graph's inputs, what it reads, and what of that is refreshed before it is called."""

    function: Callable[..., tuple[Any, ...]]
    root: Namespace
    pieces: HoistedConstants | None
    writes: bool = False

    def frozen(self) -> Callable[..., tuple[Any, ...]]:
        """The function over the very tensors that there are now, whatever is replaced later."""
        root = Namespace()
        for name, value in vars(self.root).items():
            if isinstance(value, Alias):
                setattr(root, name, Alias(dict(value._held), value._name))
            elif isinstance(value, Namespace):
                copied = Namespace()
                copied.__dict__ = dict(value.__dict__)
                setattr(root, name, copied)
            else:
                setattr(root, name, value)
        return partial(self.function, root)


def _copied(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied
