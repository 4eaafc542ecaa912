"""Which module a weight is used by, so that tied weights can part."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from peftc.passes.ir.bodies import used_by
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.stages import Stage


@dataclass(frozen=True)
class SplitOwners:
    """f(W), g(W)  ->  f(W_of_f's_module), g(W_of_g's_module)

    A trace reads a tied weight under one of its names. After this pass every use reads it under the name the using
    module knows it by, so that an adapter, a trained copy or a merge can reach one use and not the other.
    `names` maps every parameter and buffer name to the names of the same tensor.
    """

    names: Mapping[str, tuple[str, ...]] = field(hash=False)
    name: ClassVar[str] = "split-owners"
    leaves: ClassVar[Stage] = Stage.TRACED

    def run(self, graph: fx.Graph) -> Change:
        """Rewrite in place."""
        made = 0
        for node in list(graph.nodes):
            aliases = self.names.get(str(node.target), ()) if node.op == "get_attr" else ()
            if len(aliases) < 2:
                continue
            for user in list(node.users):
                wanted = owned_name(user, node, aliases) or str(node.target)
                if wanted == node.target:
                    continue
                with graph.inserting_before(node):
                    own = graph.create_node("get_attr", wanted)
                own.meta = dict(node.meta)
                user.replace_input_with(node, own)
                made += 1
            if not node.users:
                graph.erase_node(node)
        return Change(made=made)


def owned_name(user: fx.Node, weight: fx.Node, aliases: tuple[str, ...]) -> str | None:
    """The alias that belongs to the innermost module in which the user uses the weight, or None."""
    for path in reversed(used_by(user, weight)):
        for alias in aliases:
            if alias.rpartition(".")[0] == path:
                return alias
    return None
