"""The one maker of nodes: every node knows where it came from and what it holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import Argument
from torch.utils import _pytree as pytree

from peftc.passes.ir.infer import infer


@dataclass(frozen=True)
class Origin:
    """Why a node exists: the pass that made it, and for whose parameter where."""

    made_by: str
    site: str = ""
    position: int | None = None  # of the adapter among the active ones
    role: str = ""


@dataclass
class Emit:
    """Appends nodes to a graph before a given node, propagating fake values as it goes (see `infer`).

    `like` is the node whose place in the module tree the new ones take.
    """

    graph: fx.Graph
    before: fx.Node
    origin: Origin
    like: fx.Node
    made: list[fx.Node] = field(default_factory=list)

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator on nodes and constants."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(op, args, kwargs)
        values = fx.map_arg((args, kwargs), value_of)
        node.meta["val"] = infer(op, *values, mode_of(args, kwargs) or mode_of(self.like))
        return self._mark(node, self.origin)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The node in this type, itself if it already is."""
        return node if self.tensor(node).dtype == dtype else self.call(torch.ops.aten.to.dtype, node, dtype)

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """The fake tensor a node holds."""
        value = node.meta["val"]
        assert isinstance(value, torch.Tensor)
        return value

    def slot(self, target: str, value: torch.Tensor, position: int | None = None, role: str = "") -> fx.Node:
        """A read of a tensor by its attribute name; `value` is a (fake) tensor like the one that will be there."""
        with self.graph.inserting_before(self.before):
            node = self.graph.create_node("get_attr", target)
        node.meta["val"] = value
        return self._mark(node, replace(self.origin, position=position, role=role))

    def constant(self, target: str, value: float) -> fx.Node:
        """A read of a plain number by its attribute name."""
        with self.graph.inserting_before(self.before):
            node = self.graph.create_node("get_attr", target)
        node.meta["val"] = value
        return self._mark(node, self.origin)

    def _mark(self, node: fx.Node, origin: Origin) -> fx.Node:
        node.meta["peftc"] = origin
        stack = self.like.meta.get("nn_module_stack")
        if stack is not None:
            node.meta["nn_module_stack"] = stack
        self.made.append(node)
        return node


def value_of(node: fx.Node) -> Any:
    """The fake tensor, symbolic number or constant a node holds."""
    return node.meta["val"]


def mode_of(*arguments: Argument) -> Any:
    """The fake mode of the first fake tensor among the nodes, or None."""
    found: list[Any] = []

    def look(node: fx.Node) -> fx.Node:
        for value in pytree.tree_leaves(node.meta["val"]):
            if isinstance(value, FakeTensor):
                found.append(value.fake_mode)
        return node

    fx.map_arg(arguments, look)
    return found[0] if found else None


_LIKE: WeakKeyDictionary[FakeTensorMode, WeakValueDictionary[object, torch.Tensor]] = WeakKeyDictionary()


def fake_like(shape: Sequence[int], dtype: torch.dtype, near: fx.Node) -> torch.Tensor:
    """A fake tensor of this shape in the mode and on the device of the value of `near`: one for all that are alike.

    So whatever is made of the slots of equal layers is one too, and `infer` need not make it again.
    """
    value = near.meta["val"]
    known = _LIKE.setdefault(value.fake_mode, WeakValueDictionary())
    key = (tuple(shape), dtype, value.device)
    found = known.get(key)
    if found is None:
        with value.fake_mode:
            found = known[key] = torch.empty(key[0], dtype=dtype, device=value.device)
    return found
