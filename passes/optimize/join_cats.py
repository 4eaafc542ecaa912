"""Joins concatenations: keys and values in front of a cache need no copy of it."""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.ir.pass_manager import Change, Miss
from peftc.passes.ir.stages import Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class JoinCats:
    """cat(cat(a, b), c)  ->  cat(a, b, c);  size(cat(a, b))  ->  size(a) + size(b)

    Where the inner one is an adapter's, and nothing else reads it.
    """

    name: ClassVar[str] = "join-cats"
    leaves: ClassVar[Stage] = Stage.PORTABLE

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        made = removed = 0
        misses: list[Miss] = []
        for node in graph.find_nodes(op="call_function", target=aten.cat.default):
            miss = self.check(node)
            if miss is not None:
                misses.append(miss)
                continue
            axis = _axis(node)
            for user in list(node.users):
                if user.target is aten.cat.default:
                    parts = [part for each in _parts(user) for part in (_parts(node) if each is node else [each])]
                    user.args = (parts, *user.args[1:])
                else:
                    made += self._measure(graph, user, node, axis)
                    graph.erase_node(user)
                    removed += 1
            graph.erase_node(node)
            removed += 1
        return Change(made=made, removed=removed, misses=tuple(misses))

    def check(self, node: fx.Node) -> Miss | None:
        """Why a concatenation is not an adapter's, or read by more than others along its axis and for its sizes."""
        if not isinstance(node.meta.get("peftc"), Origin):
            return Miss("not an adapter's", node)
        if not node.users:
            return Miss("nothing reads it", node)
        for user in node.users:
            if user.target is aten.cat.default and _axis(user) == _axis(node):
                continue
            if user.target is not aten.sym_size.int:
                return Miss(f"read by {user}, which is no concatenation along its axis", node)
        return None

    def _measure(self, graph: fx.Graph, user: fx.Node, node: fx.Node, axis: int) -> int:
        """Put the size that `user` asks for in its place."""
        emit = Emit(graph, user, Origin(self.name), like=node)
        parts, wanted = _parts(node), _axis(user)
        size = emit.call(aten.sym_size.int, parts[-1], wanted)
        for part in parts[:-1] if wanted == axis else ():
            size = emit.call(operator.add, size, _size(part, axis) or emit.call(aten.sym_size.int, part, axis))
        user.replace_all_uses_with(size)
        return len(emit.made)


def _parts(node: fx.Node) -> list[fx.Node]:
    """What a concatenation is of."""
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    return [each for each in parts if isinstance(each, fx.Node)]


def _axis(node: fx.Node) -> int:
    """The axis that a concatenation goes along, or a size is asked of."""
    axis = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(axis, int)
    of = node if node.target is aten.cat.default else node.all_input_nodes[0]
    return axis % int(of.meta["val"].dim())


def _size(part: fx.Node, axis: int) -> int | None:
    """A size that is a number."""
    size = part.meta["val"].shape[axis]
    return size if isinstance(size, int) else None
