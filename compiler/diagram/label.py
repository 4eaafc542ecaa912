"""What a group of fx nodes is called."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from peftc.compiler.diagram.front import (
    IN_FRONT,
    adapter_lines,
    attention_lines,
    is_attention,
    is_front,
    is_rows,
    rows_lines,
    widened_label,
)
from peftc.compiler.diagram.group import Grouping, is_major
from peftc.compiler.diagram.operators import (
    ACTIVATIONS,
    ATTENTION,
    NORMS,
    SYMBOLS,
    TIMES,
    holds_tensor,
    is_plumbing,
    name_of,
    origin_of,
    shape_of,
    tensor_inputs,
)
from peftc.compiler.diagram.scope import scopes

MANY = 4
MATRIX = 2  # axes


@dataclass(frozen=True)
class Label:
    """The kind, title and further lines of a drawn node."""

    kind: str
    title: str
    lines: tuple[str, ...] = ()


def label(members: Sequence[fx.Node], grouping: Grouping) -> Label:
    """Name a group by what it does; modules that are one node also by their own name."""
    head = members[0]
    if head.op == "placeholder" or any(each.op == "placeholder" for each in members):
        source = next(each for each in members if each.op == "placeholder")
        return Label("input", str(source.target))
    if any(each.op == "output" for each in members):
        return Label("output", "output")
    if any(each in grouping.led for each in members):
        return Label("join", IN_FRONT)
    if any(each in grouping.joins for each in members):
        return Label("join", "+")
    wider = next((each for each in reversed(members) if each in grouping.widened), None)
    if wider is not None:
        return Label("widened", *widened_label(members, grouping.widened[wider]))
    rewritten = [each for each in members if origin_of(each) is not None]
    if any(each in grouping.position for each in rewritten):
        return _adapter(members)
    if all(each.op == "get_attr" or is_plumbing(each) for each in members):
        weight = next((each for each in members if each.op == "get_attr"), head)
        return Label("weight", str(weight.target).rpartition(".")[2], tuple(filter(None, (shape_of(weight),))))
    return _operator(members, grouping)


def _adapter(members: Sequence[fx.Node]) -> Label:
    roles = {each: origin.role for each in members if (origin := origin_of(each)) is not None and origin.role}
    calls = [each for each in members if each.op == "call_function" and not is_plumbing(each)]
    if not calls:
        tensors = tuple(f"{role} {shape_of(each)}".strip() for each, role in roles.items())
        if not any(map(is_front, members)):
            return Label("adapter", "trained copy", tensors)
    if any(map(is_front, members)):
        return Label("adapter", "", adapter_lines(members, roles))
    if is_rows(members):
        return Label("adapter", "", rows_lines(members, roles))
    if is_attention(members):
        return Label("adapter", "", attention_lines(members, roles))
    steps: list[str] = []
    for call in filter(holds_tensor, calls):
        read = [(roles[source], shape_of(source)) for each in call.all_input_nodes if (source := _slot(each)) in roles]
        symbol = SYMBOLS.get(name_of(call), name_of(call))
        if symbol in ("linear", "matmul", "embedding", "addmm") and read:
            steps += [f"{role} {shape}" for role, shape in read]
        else:
            steps.append(" ".join([symbol, *(role for role, _ in read)]))
    return Label("adapter", "", tuple(steps))


def _slot(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and is_plumbing(node) and tensor_inputs(node):
        node = tensor_inputs(node)[0]
    return node


def _operator(members: Sequence[fx.Node], grouping: Grouping) -> Label:
    work = [each for each in members if each.op == "call_function" and not is_plumbing(each)] or list(members)
    main = next((each for each in work if is_major(each)), work[0])
    names = [name_of(each) for each in work if each.op == "call_function"]
    around = scopes(main)
    is_leaf = bool(around) and around[-1].path in grouping.leaves
    kind, doing = _doing(main, names, around[-1].type if is_leaf else "")
    if not any(each in grouping.data for each in work):
        kind = "plumbing"
        if not is_leaf:
            return Label(kind, "mask" if _is_mask(members) else "positions")
    if not is_leaf:
        return Label(kind, doing, _sizes(main))
    title = around[-1].module.rpartition(".")[2]
    lines = [doing] if doing and doing != title else []
    return Label(kind, title, tuple(lines) + _sizes(main))


def _doing(main: fx.Node, names: list[str], module_type: str) -> tuple[str, str]:
    name = name_of(main)
    if name == ATTENTION:
        return "attention", "attention"
    if name in NORMS or {"rsqrt", "mean"} <= set(names) or "Norm" in module_type:
        return "norm", module_type or name
    if name in ACTIVATIONS:
        return "activation", name
    if is_major(main):
        return "operator", name
    if {"neg", "cat", "mul"} <= set(names):
        return "plumbing", "rotate"
    if set(names) & {"tanh", "erf", *ACTIVATIONS}:
        return "activation", module_type or "activation"
    if set(names) == {"add"}:
        return "add", "+"
    if set(names) == {"mul"}:
        return "multiply", TIMES
    if module_type:
        return "operator", module_type
    distinct = list(dict.fromkeys(SYMBOLS.get(each, each) for each in names))
    shown = distinct if len(distinct) <= MANY else [*distinct[: MANY - 1], "…"]
    return "operator", ", ".join(shown)


def _is_mask(members: Sequence[fx.Node]) -> bool:
    for each in members:
        value = each.meta.get("val")
        if value is not None and str(getattr(value, "dtype", "")) == "torch.bool":
            return True
    return False


def _sizes(main: fx.Node) -> tuple[str, ...]:
    """`in → out` of the matrix an operator reads."""
    name = name_of(main)
    read = [shape_of(each).split(TIMES) for each in main.all_input_nodes if _slot(each).op == "get_attr"]
    matrix = next((each for each in read if len(each) == MATRIX), None)
    if matrix is None:
        return ()
    return (f"{matrix[1]} → {matrix[0]}",) if name == "linear" else (f"{matrix[0]} → {matrix[1]}",)
