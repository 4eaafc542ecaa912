"""What an operator of a graph does: floating-point operations, bytes moved, calls. And what its gradient does."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftc.passes.ir.emit import Origin
from peftc.passes.ir.views import VIEWS, is_view
from peftc.passes.quantized.packed_operators import QUANTIZED_LINEAR

aten = torch.ops.aten

_LOOKUPS = frozenset({aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default})
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})

# Which operand's last size is the one summed over.
_PRODUCTS: dict[Callable[..., Any], int] = {
    **dict.fromkeys((QUANTIZED_LINEAR, aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default), 0),
    **dict.fromkeys((aten.addmm.default, aten.addmm_.default), 1),
    aten.einsum.default: 0,
}

# Of a matrix of n rows: about so many times n^3, as measured. They are no longer near the peak of a processor.
_CUBIC: dict[Callable[..., Any], int] = {
    aten.linalg_inv.default: 8,
    aten.linalg_matrix_exp.default: 50,
    aten.linalg_qr.default: 16,
    aten.linalg_solve.default: 8,
    aten.linalg_svd.default: 70,
}
_EINSUM_CALLS = 6  # it permutes, reshapes and multiplies
_NEAR = 2**20  # bytes


@dataclass(frozen=True)
class Work:
    """Floating-point operations, bytes read and written, operators called.

    `near` are those of the bytes that operators on little data move: what one wrote, the next finds in a cache.
    """

    flops: int = 0
    bytes: int = 0
    calls: int = 0
    near: int = 0

    def __add__(self, other: "Work") -> "Work":
        near = self.near + other.near
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.calls + other.calls, near)

    def __mul__(self, times: int) -> "Work":
        return Work(self.flops * times, self.bytes * times, self.calls * times, self.near * times)


def trained_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that a gradient goes through: those of the activation and of the adapter's tensors."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_slot = node.op == "get_attr" and isinstance(node.meta.get("peftc"), Origin)
        inputs = any(each in found for each in node.all_input_nodes) and node.target is not aten.detach.default
        if (node.op == "placeholder" or is_slot or inputs) and _is_continuous(node):
            found.add(node)
    return found


def forward_work(node: fx.Node) -> Work:
    """What calling an operator costs."""
    result = _tensor(node)
    operands = [value for value in map(_tensor, node.all_input_nodes) if value is not None]
    if result is None or is_view(node) or node.target is operator.getitem:
        return Work(calls=1)
    if node.target in VIEWS or node.target in _LOOKUPS:
        return _moving(2 * _bytes(result), calls=1)
    moved = sum(map(_bytes, (*operands, result)))
    return _moving(moved, _flops(node, operands, result), _calls(node, operands))


def backward_work(node: fx.Node, trained: set[fx.Node]) -> Work:
    """What the gradients of an operator's operands cost, and summing those that arrive at its result."""
    if node not in trained:
        return Work()
    total = sum((_gradient(node, each) for each in node.all_input_nodes if each in trained), Work())
    readers = sum(each in trained for each in node.users)
    result = _tensor(node)
    if readers > 1 and result is not None:
        total += _moving(3 * _bytes(result), result.numel(), 1) * (readers - 1)
    return total


def _gradient(node: fx.Node, operand: fx.Node) -> Work:
    result, value = _tensor(node), _tensor(operand)
    if result is None or value is None or is_view(node):
        return Work(calls=1)
    stretched = _moving(_bytes(result), result.numel()) if value.numel() < result.numel() else Work()
    if node.target in _SUMS:
        return stretched + Work(calls=1)
    is_product = node.target in _PRODUCTS or node.target in _CUBIC or node.target in _LOOKUPS
    return forward_work(node) + (Work() if is_product else stretched)


def _moving(moved: int, flops: int = 0, calls: int = 0) -> Work:
    return Work(flops, moved, calls, moved if moved <= _NEAR else 0)


def _flops(node: fx.Node, operands: list[torch.Tensor], result: torch.Tensor) -> int:
    target: Any = node.target
    if target in _PRODUCTS:
        return 2 * result.numel() * int(operands[_PRODUCTS[target]].shape[-1])
    if target in _CUBIC:
        return _CUBIC[target] * operands[0].numel() * min(map(int, operands[0].shape[-2:]))
    if target in (aten.fft_ifft2.default, aten.fft_fft2.default):
        return int(20 * result.numel() * math.log2(max(2, result.numel())))
    return result.numel()


def _calls(node: fx.Node, operands: list[torch.Tensor]) -> int:
    if node.target is aten.einsum.default:
        return _EINSUM_CALLS
    # LAPACK takes one matrix at a time.
    return math.prod(operands[0].shape[:-2]) if node.target in _CUBIC else 1


def _tensor(node: fx.Node) -> torch.Tensor | None:
    """The value of a node, the first of several; None for a number, and for the output."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, tuple | list) else value
    return first if isinstance(first, torch.Tensor) else None


def _is_continuous(node: fx.Node) -> bool:
    value = _tensor(node)
    return value is not None and (value.is_floating_point() or value.is_complex())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
