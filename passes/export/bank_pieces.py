"""What programs take of each adapter that rows choose from: named by what it is computed from.

A later export of another adapter, of the same base, gives equal names to what is computed alike.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftc.passes.export.fold import frontier
from peftc.passes.export.lift import Lifted
from peftc.passes.plan.structure import MEMBER
from peftc.passes.route.laws import site_of

CONSTANT = "constant."
"""How the names of tensors begin that are a trace's own."""


@dataclass(frozen=True)
class Piece:
    """A node that depends on adapters and on no input, and meets what does.

    `reads` are the tensors of slots that it is computed from, by their names in the graph.
    """

    name: str
    node: fx.Node
    reads: frozenset[str]

    @property
    def is_member(self) -> bool:
        """Whether it says which adapters have a lane."""
        return self.node.op == "placeholder" and self.name.rpartition(".")[2] == MEMBER


def pieces_of(lifted: Lifted, slots: Mapping[str, str]) -> tuple[Piece, ...]:
    """The pieces of a lifted graph, in its order. `slots` are, by the names of tensors, what to call these."""
    names, found = _Names(lifted, slots), []
    for node in frontier(lifted, lifted.tensors_named(frozenset(slots))):
        found.append(Piece(names.of(node), node, names.reads(node)))
    return tuple(found)


class _Names:
    """Names for what is computed: equal ones for equal computations."""

    def __init__(self, lifted: Lifted, slots: Mapping[str, str]):
        self._lifted, self._slots = lifted, slots
        self._digests: dict[fx.Node, str] = {}
        self._reads: dict[fx.Node, frozenset[str]] = {}

    def of(self, node: fx.Node) -> str:
        """A slot's own name, or the site, the operator and a digest of all that it is computed from."""
        if node.op == "placeholder":
            return self._slots[self._lifted.names[node]]
        operator = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
        return f"{site_of(node)}.{operator}_{self._digest(node)[:12]}".lstrip(".")

    def reads(self, node: fx.Node) -> frozenset[str]:
        """The names of the slots' tensors that a node is computed from."""
        if node not in self._reads:
            name = self._lifted.names.get(node, "")
            own = frozenset((name,)) if name in self._slots else frozenset()
            self._reads[node] = own.union(*(self.reads(each) for each in node.all_input_nodes))
        return self._reads[node]

    def _digest(self, node: fx.Node) -> str:
        if node not in self._digests:
            self._digests[node] = hashlib.sha256(self._text(node).encode()).hexdigest()
        return self._digests[node]

    def _text(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            name = self._lifted.names[node]
            # Traces number their constants: a number may be another's in a later one.
            own = digest_of(self._lifted.tensors[node]) if name.startswith(CONSTANT) else name
            return self._slots.get(name, own)

        def written(argument: Any) -> Any:
            return f"<{self._digest(argument)}>" if isinstance(argument, fx.Node) else argument

        args, kwargs = fx.map_arg((node.args, node.kwargs), written)
        return f"{node.target}({args}, {dict(sorted(kwargs.items()))})"


def digest_of(tensor: torch.Tensor) -> str:
    """A digest of a tensor's values, type and sizes."""
    plain = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{plain.dtype} {list(plain.shape)} ".encode())
    found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def owners(names: Collection[str]) -> frozenset[str]:
    """The slots that these tensors are in, by their attribute paths."""
    return frozenset(each.rpartition(".")[0] for each in names)
