"""The stages of a graph, and which operators it may hold in each: one table."""

from dataclasses import dataclass
from enum import IntEnum
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from peftc.passes.ir.emit import Origin


class Stage(IntEnum):
    """How far a graph has come. What is bound goes on to run (fused, native) or to leave the house (lifted, closed)."""

    TRACED = 1  # as the exporter leaves it, with its assertions
    CLEANED = 2
    WIDENED = 3  # virtual tokens stand in front
    ADAPTED = 4  # adapters of weights are in
    BOUND = 5  # packed weights are read as they are stored
    PORTABLE = 6  # for any compiler: torch's own operators, nothing written in place by us
    FUSED = 7  # for Python: adapters write in place
    NATIVE = 8  # and operators are called the short way
    LIFTED = 9  # what the graph read is an input
    CLOSED = 10  # adapters are folded into constants, or each row chooses its own


@dataclass(frozen=True)
class Row:
    """Operators by a pattern of names, and the stages they may be in; `ours` are writes that an adapter makes."""

    pattern: str
    stages: frozenset[Stage]
    ours: bool = False


def _between(first: Stage, last: Stage) -> frozenset[Stage]:
    return frozenset(each for each in Stage if first <= each <= last)


INSIDE = _between(Stage.TRACED, Stage.NATIVE)
ALWAYS = frozenset(Stage)

# The first row that matches decides; what none matches is legal nowhere.
LEGAL: tuple[Row, ...] = (
    Row("placeholder", ALWAYS),
    Row("output", ALWAYS),
    Row("get_attr", INSIDE),
    # The exporter's own: its guards, and what it asserts of sizes and types.
    Row("module _guards_fn", frozenset({Stage.TRACED})),
    Row("aten._assert_tensor_metadata.default", frozenset({Stage.TRACED})),
    Row("aten._assert_scalar.default", frozenset({Stage.TRACED})),
    Row("aten.sym_constrain_range_for_size.default", frozenset({Stage.TRACED})),
    # A linear whose weight is packed: what a trace calls it, what it is bound to, and that called the short way.
    Row("peftc.quantized_linear.default", _between(Stage.TRACED, Stage.ADAPTED)),
    Row("peftc.packed_linear.default", _between(Stage.BOUND, Stage.FUSED) | {Stage.LIFTED, Stage.CLOSED}),
    Row("peftc.unpack.default", _between(Stage.BOUND, Stage.FUSED) | {Stage.LIFTED, Stage.CLOSED}),
    Row("peftc.passes.quantized.packed_operators.*", frozenset({Stage.NATIVE})),
    Row("peftc.passes.ir.cache_update.update_cache", INSIDE),
    # Products with each row's own matrices, which may lie by adapter: only where Python runs the graph.
    Row("peftc.passes.route.group_rows.*", frozenset({Stage.FUSED, Stage.NATIVE})),
    Row("peftc.*", frozenset()),
    # Numbers made of sizes.
    Row("operator.*", ALWAYS),
    Row("math.*", ALWAYS),
    Row("builtins.*", ALWAYS),
    Row("torch.sym_*", ALWAYS),
    Row("torch._sym_*", ALWAYS),
    # Conditions and loops, whose operands are graphs: no program takes these along.
    Row("higher_order.*", INSIDE),
    # torch's generated bindings, a shorter way to call the same.
    Row("torch.*", frozenset({Stage.NATIVE})),
    # In place, by us: only where Python runs the graph. A model may write to what it likes.
    Row("*", frozenset({Stage.FUSED, Stage.NATIVE}), ours=True),
    # Any other operator, torch's or of a library that the model uses.
    Row("*.*.*", ALWAYS),
)


def is_legal(node: fx.Node, stage: Stage) -> bool:
    """Whether a node may be in a graph of this stage."""
    ours = isinstance(node.meta.get("peftc"), Origin) and writes(node)
    return stage in _stages(name_of(node), ours)


def name_of(node: fx.Node) -> str:
    """What a node calls as the table has it: `aten.add.Tensor`, `torch.add`, `get_attr`."""
    if node.op == "call_function":
        return _function_name(node.target)
    return node.op if node.op in ("placeholder", "output", "get_attr") else f"{node.op[5:]} {node.target}"


def writes(node: fx.Node) -> bool:
    """Whether a node's operator writes to one of its operands."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


@cache
def _stages(name: str, ours: bool) -> frozenset[Stage]:
    for row in LEGAL:
        if fnmatchcase(name, row.pattern) and (ours or not row.ours):
            return row.stages
    return frozenset()


@cache
def _function_name(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target)
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target.__name__}"
    owner = getattr(target, "__module__", None) or getattr(getattr(target, "__objclass__", None), "__module__", None)
    # Most of torch's bindings do not say where they are from.
    owner = {None: "torch", "_operator": "operator"}.get(owner, owner)
    return f"{owner}.{getattr(target, '__name__', target)}"
