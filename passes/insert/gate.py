"""How much of what an adapter adds each token takes: a number that is read where the adapter's tensors are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftc.passes.ir.emit import Emit
from peftc.passes.ir.infer import is_same_size
from peftc.passes.ir.row_order import has_rows_first

aten = torch.ops.aten


@dataclass(frozen=True)
class Tokens:
    """The tokens of a graph's call: an input `[rows, tokens, ..]`, activations or else ids."""

    node: fx.Node

    @property
    def rows(self) -> int | torch.SymInt:
        """How many rows there are."""
        return self._shape[0]

    @property
    def count(self) -> int | torch.SymInt:
        """How many tokens each has."""
        return self._shape[1]

    @property
    def _shape(self) -> torch.Size:
        shape: torch.Size = self.node.meta["val"].shape
        return shape


def tokens_of(graph: fx.Graph) -> Tokens | None:
    """The input that has a graph's tokens, or None where none has rows of them."""
    inputs = [each for each in graph.find_nodes(op="placeholder") if isinstance(each.meta["val"], torch.Tensor)]
    found = with_tokens([each.meta["val"] for each in inputs])
    return None if found is None else Tokens(inputs[found])


def with_tokens(values: Sequence[torch.Tensor]) -> int | None:
    """Which of a call's tensors has rows of tokens: the first activation `[rows, tokens, ..]`, or else first ids."""
    activations = [each for each, value in enumerate(values) if value.is_floating_point() and value.dim() == 3]
    ids = [each for each, value in enumerate(values) if not value.is_floating_point() and value.dim() == 2]
    return next(iter(activations or ids), None)


def gate(emit: Emit, tokens: Tokens, slot: str, like: fx.Node) -> fx.Node:
    """Read the number of each token, `[rows, tokens, 1]`, or one for all of a row's, `[rows, 1, 1]`."""
    value: torch.Tensor = like.meta["val"]
    dtype = value.dtype if value.dtype is torch.float64 else torch.float32
    return emit.slot(slot, value.new_empty((tokens.rows, tokens.count, 1), dtype=dtype))


def misfit(node: fx.Node, tokens: Tokens) -> str:
    """Why what a node gives has not one part for each token; empty where it has."""
    shape, rows, count = node.meta["val"].shape, tokens.rows, tokens.count
    apart = len(shape) == 3 and is_same_size(shape[0], rows) and is_same_size(shape[1], count)
    if apart or (len(shape) == 2 and is_same_size(shape[0], rows * count)):
        return ""
    return f"what it gives has the sizes {list(shape)}, and not one part for each token of the rows"


def is_disordered(node: fx.Node, tokens: Tokens) -> bool:
    """Whether the first axes of what a node gives may be in another order than the rows and their tokens.

    Of tokens what turns them round is seen: what picks them one by one mostly reads tables by their positions.
    """
    return not has_rows_first(node, tokens.rows) or any(map(_turns_tokens, _behind(node)))


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    left, seen = [node], {node}
    while left:
        each = left.pop()
        yield each
        left += [one for one in each.all_input_nodes if one not in seen]
        seen.update(each.all_input_nodes)


def _turns_tokens(node: fx.Node) -> bool:
    turns = node.target in (aten.flip.default, aten.roll.default)
    axes: Any = node.args[-1] if turns and len(node.args) > 1 else ()
    return turns and (1 in axes or not axes)


def weighed(emit: Emit, change: fx.Node, by: fx.Node, tokens: Tokens, node: fx.Node) -> fx.Node:
    """A change of what `node` gives, each token's as much as its number says."""
    if node.meta["val"].dim() == 3:
        return emit.call(aten.mul.Tensor, change, by)
    if change.meta["val"].dim() == 2:
        sizes: list[Any] = [emit.call(aten.sym_size.int, tokens.node, axis) for axis in range(2)]
        change = emit.call(aten.reshape.default, change, [*sizes, emit.call(aten.sym_size.int, change, 1)])
    return emit.call(aten.flatten.using_ints, emit.call(aten.mul.Tensor, change, by), 0, 1)
