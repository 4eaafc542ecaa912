"""Groups of fx nodes, merged as long as the groups stay without cycles."""

from collections.abc import Iterable, Sequence

from torch import fx

from peftc.compiler.diagram.operators import holds_tensor


class Partition:
    """Starts with every node alone. Sizes are no edges: they are drawn nowhere."""

    def __init__(self, nodes: Iterable[fx.Node]):
        self.order = {node: index for index, node in enumerate(nodes)}
        self._root = {node: node for node in self.order}
        self._members = {node: [node] for node in self.order}

    def of(self, node: fx.Node) -> fx.Node:
        """The node that stands for a node's group."""
        return self._root[node]

    def members(self, node: fx.Node) -> Sequence[fx.Node]:
        """All nodes of the group, in the order of the graph."""
        return sorted(self._members[self.of(node)], key=self.order.__getitem__)

    def groups(self) -> list[Sequence[fx.Node]]:
        """All groups, ordered by their first node."""
        found = [self.members(root) for root in self._members]
        return sorted(found, key=lambda members: self.order[members[0]])

    def absorb(self, node: fx.Node, into: fx.Node) -> None:
        """Put the group of one node into that of another."""
        source, target = self.of(node), self.of(into)
        if source is target:
            return
        moved = self._members.pop(source)
        self._members[target] += moved
        for each in moved:
            self._root[each] = target

    def merge(self, first: fx.Node, second: fx.Node) -> bool:
        """One group of the two, unless a path leaves it and comes back."""
        if self.of(first) is self.of(second) or self._leaves(first, second) or self._leaves(second, first):
            return self.of(first) is self.of(second)
        self.absorb(second, first)
        return True

    def _leaves(self, start: fx.Node, end: fx.Node) -> bool:
        """Whether a path goes from one group to the other through a third."""
        goal, last = self.of(end), max(self.order[each] for each in self._members[self.of(end)])
        inside = {self.of(start), goal}
        seen: set[fx.Node] = set()
        ready = [self.of(user) for each in self._members[self.of(start)] for user in self._users(each)]
        while ready:
            group = ready.pop()
            if group in seen or group in inside:
                continue
            seen.add(group)
            for member in self._members[group]:
                for user in self._users(member):
                    if self.of(user) is goal:
                        return True
                    if self.order[user] <= last:
                        ready.append(self.of(user))
        return False

    @staticmethod
    def _users(node: fx.Node) -> list[fx.Node]:
        return list(node.users) if holds_tensor(node) else []
