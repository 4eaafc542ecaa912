"""What a node holds, worked out anew from what its operands hold: an operator run on their fake values.

A graph repeats itself, so what was worked out for an operator is remembered by the types of its operands (sizes and
strides as expressions, types, devices) and by its constants, for as long as the fake mode of the graph lives. Nothing
else about fake values matters to an operator, so a second layer costs a look-up.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

OPERATOR = "operator"
"""The metadata that a native call has: the operator that it is another spelling of."""

Operator = Callable[..., Any]


@dataclass(frozen=True)
class TensorType:
    """All of a fake tensor that operators can see: sizes and strides as expressions."""

    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    offset: Any
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout
    flags: tuple[bool, bool]  # conjugated, negative


@dataclass(frozen=True)
class _Made:
    """A tensor that an operator gives: a new one, or a view of an operand's storage (the how-many-th tensor)."""

    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    offset: Any
    dtype: torch.dtype
    device: torch.device
    operand: int | None
    known: "_Known"


class _Known:
    """The tensors that were made so, while somebody has them: a new one, and views by the operand that they are of.

    Fake values say nothing but their types, so one may stand in many places: where it is still there, it is not made
    again, which would take longer than all else.
    """

    def __init__(self) -> None:
        self._new: Callable[[], torch.Tensor | None] | None = None
        self._views: Any = WeakTensorKeyDictionary()

    def keep(self, value: torch.Tensor, operand: torch.Tensor | None) -> torch.Tensor:
        """This one was made."""
        if operand is None:
            self._new = ref(value)
        else:
            self._views[operand] = ref(value)
        return value

    def found(self, operand: torch.Tensor | None) -> torch.Tensor | None:
        """The one that was made, of this operand if it is a view."""
        known = self._new if operand is None else self._views.get(operand)
        return None if known is None else known()


class _Memo:
    """What operators gave, by themselves and the types of their operands. Holds no fake tensor, which would hold the
    mode that the memo is kept for."""

    def __init__(self) -> None:
        self.known: dict[object, tuple[list[Any], pytree.TreeSpec]] = {}
        self.calls = 0


_MEMOS: WeakKeyDictionary[FakeTensorMode, _Memo] = WeakKeyDictionary()


def why_not(node: fx.Node) -> str | None:
    """Why a node's value cannot be worked out from its operands', or None. This is the whole list."""
    value = node.meta.get("val")
    operator = operator_of(node)
    if node.op != "call_function":
        # Inputs, and what is read of modules and slots, are where values come from. A module is called only by the
        # exporter, to check its guards, and gives nothing.
        return f"it is a {node.op}"
    if value is None:
        return "it gives nothing: an assertion, or a call for its effect"
    if is_effect(node):
        # The branches of a condition, the body of a loop: the exporter inferred these.
        return "its operands are graphs of their own"
    if torch.Tag.inplace_view in getattr(operator, "tags", ()):
        # The recorded operand is what it is afterwards: doing it again would change it once more.
        return "it changes the shape of its operand in place"
    if unbacked(value) - unbacked([each.meta.get("val") for each in node.all_input_nodes]):
        # A mask's number of true places, an item: each run would give it another symbol.
        return "it has a size that only data says"
    return None


def is_effect(node: fx.Node) -> bool:
    """Whether a node gives nothing, or is an operator whose operands are graphs: neither is run on fake values."""
    if node.meta.get("val") is None or isinstance(operator_of(node), HigherOrderOperator):
        return True
    return any(each.meta.get("val", node) is None for each in node.all_input_nodes)


def operator_of(node: fx.Node) -> Any:
    """What a node calls. A native call is worked out as the operator that it spells."""
    return node.meta.get(OPERATOR, node.target)


def infer(operator: Operator, args: Any, kwargs: Mapping[str, Any], mode: FakeTensorMode | None) -> Any:
    """What an operator gives for these values, in a fake mode. Raises whatever the operator raises."""
    if torch.Tag.inplace_view in getattr(operator, "tags", ()):
        args = (args[0].detach(), *args[1:])  # it changes the shape of this one, which may stand in other places too
    if mode is None:
        return _run(operator, args, kwargs, None)
    memo = _MEMOS.setdefault(mode, _Memo())
    leaves, form = pytree.tree_flatten((args, kwargs))
    key = _key(operator, leaves, form)
    found = memo.known.get(key) if key is not None else None
    if found is None:
        memo.calls += 1
        value = _run(operator, args, kwargs, mode)
        made = _remembered(value, leaves)
        if key is not None and made is not None:
            memo.known[key] = made
        return value
    parts, result = found
    return pytree.tree_unflatten([_again(part, leaves, mode) for part in parts], result)


def inferred_type(operator: Operator, args: Any, kwargs: Mapping[str, Any], mode: FakeTensorMode | None) -> Any:
    """As `infer`, without making a fake tensor where the answer is known: what `agree` and `described` need."""
    if mode is not None:
        leaves, form = pytree.tree_flatten((args, kwargs))
        key = _key(operator, leaves, form)
        found = _MEMOS.setdefault(mode, _Memo()).known.get(key) if key is not None else None
        if found is not None:
            return pytree.tree_unflatten(found[0], found[1])
    return infer(operator, args, kwargs, mode)


def calls_of(mode: FakeTensorMode) -> int:
    """How many operators were really run in a mode: what tests of the memo count."""
    return _MEMOS.setdefault(mode, _Memo()).calls


def agree(recorded: Any, inferred: Any) -> bool:
    """Whether two values say the same: of tensors shapes, types and devices, of sizes their expressions."""
    one, two = pytree.tree_leaves(recorded), pytree.tree_leaves(inferred)
    return len(one) == len(two) and all(map(_same, one, two))


def described(value: Any) -> str:
    """A value as messages show it: `float32[s0, 8] on cpu`."""
    parts = [_described(each) for each in pytree.tree_leaves(value)]
    return parts[0] if len(parts) == 1 else f"({', '.join(parts)})"


def is_same_size(size: Any, other: Any) -> bool:
    """Whether two sizes, numbers or symbols, are known to be one, whatever the symbols are."""
    if isinstance(size, int) and isinstance(other, int):
        return size == other
    one, two = _expression(size), _expression(other)
    if one == two:
        return True
    environment = next(each.node.shape_env for each in (size, other) if isinstance(each, torch.SymInt))
    return bool(environment.simplify(one - two) == 0)


def _described(value: Any) -> str:
    if not isinstance(value, torch.Tensor | _Made):
        return str(value)
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}] on {value.device}"


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor | _Made) and isinstance(two, torch.Tensor | _Made):
        if (one.dtype, one.device, len(one.shape)) != (two.dtype, two.device, len(two.shape)):
            return False
        return all(map(is_same_size, one.shape, two.shape))
    if isinstance(one, torch.SymInt | int) and isinstance(two, torch.SymInt | int):
        return is_same_size(one, two)
    if isinstance(one, torch.SymFloat | torch.SymBool) or isinstance(two, torch.SymFloat | torch.SymBool):
        return bool(_expression(one) == _expression(two))
    return type(one) is type(two) and bool(one == two)


def _run(operator: Operator, args: Any, kwargs: Mapping[str, Any], mode: FakeTensorMode | None) -> Any:
    # Without the dispatcher some operators take sizes for plain numbers.
    with torch.no_grad(), enable_python_dispatcher():
        if mode is None:
            return operator(*args, **kwargs)
        with mode:
            return operator(*args, **kwargs)


def _key(operator: Operator, leaves: Iterable[Any], form: pytree.TreeSpec) -> object | None:
    """What a call is known by, or None where it has to be made."""
    parts: list[object] = [operator, form]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            # One that has a value beside its type, such as a number that was lifted, may be asked for it.
            if type(leaf) is not FakeTensor or leaf.constant is not None or leaf.layout is not torch.strided:
                return None
            parts.append(_type(leaf))
        elif isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool):
            parts.append((type(leaf), leaf.node.expr))
        else:
            parts.append((type(leaf), leaf))
    return tuple(parts)


def _type(tensor: torch.Tensor) -> TensorType:
    return TensorType(
        tuple(map(_expression, tensor.shape)),
        tuple(map(_expression, tensor.stride())),
        _expression(tensor.storage_offset()),
        tensor.dtype,
        tensor.device,
        tensor.layout,
        (tensor.is_conj(), tensor.is_neg()),
    )


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else size


def _remembered(value: Any, leaves: Sequence[Any]) -> tuple[list[Any], pytree.TreeSpec] | None:
    """A value as the memo keeps it, or None where it cannot be made again from types alone."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    operands = [_storage(each) for each in tensors]
    parts, form = pytree.tree_flatten(value)
    if unbacked(parts) - unbacked(leaves):
        return None  # each run gives it another symbol
    kept: list[Any] = []
    fresh: set[int] = set()
    for part in parts:
        if isinstance(part, torch.Tensor):
            if type(part) is not FakeTensor or part.constant is not None or part.layout is not torch.strided:
                return None
            storage = _storage(part)
            operand = operands.index(storage) if storage in operands else None
            if part.is_conj() or part.is_neg() or (operand is None and storage in fresh):
                return None
            if operand is not None and tensors[operand].dtype != part.dtype:
                return None
            fresh.add(storage)
            offset = part.storage_offset()
            known = _Known()
            known.keep(part, None if operand is None else tensors[operand])
            kept.append(_Made(tuple(part.shape), part.stride(), offset, part.dtype, part.device, operand, known))
        elif part is None or isinstance(part, bool | int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
            kept.append(part)
        else:
            return None
    return kept, form


def _again(part: Any, leaves: Iterable[Any], mode: FakeTensorMode) -> Any:
    if not isinstance(part, _Made):
        return part
    operand = None
    if part.operand is not None:
        operand = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)][part.operand]
    found = part.known.found(operand)
    if found is not None:
        return found
    # As a fake mode makes one, without asking its cache, which knows less than we do and takes ten times longer.
    if operand is None:
        made = torch.empty_strided(part.shape, part.strides, dtype=part.dtype, device="meta")
    else:
        with torch.no_grad(), in_kernel_invocation_manager(mode):
            made = torch.as_strided(operand, part.shape, part.strides, part.offset)
    return part.known.keep(FakeTensor(mode, made, part.device), operand)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def unbacked(value: Any) -> set[Any]:
    """The symbols of a value's sizes that only data has an answer for."""
    found: set[Any] = set()
    for leaf in pytree.tree_leaves(value):
        for size in leaf.shape if isinstance(leaf, torch.Tensor) else (leaf,):
            if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
                found |= _unbacked_in(size.node.expr)
    return found


@lru_cache(maxsize=4096)
def _unbacked_in(expression: Any) -> frozenset[Any]:
    return frozenset(free_unbacked_symbols(expression))
