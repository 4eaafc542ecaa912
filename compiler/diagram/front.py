"""What is inserted beside weights: which nodes of a graph belong to it, and what the drawn ones say."""

from collections.abc import Sequence

import torch
from torch import fx

from peftc.compiler.diagram.operators import (
    ATTENTION,
    SYMBOLS,
    TIMES,
    holds_tensor,
    is_plumbing,
    name_of,
    origin_of,
    shape_of,
)
from peftc.passes.ir.inputs import spec_of
from peftc.passes.ir.roles import Role

IN_FRONT = "⊕"

_FRONTS = frozenset(("insert-prompt", "insert-prefix", "carry-prompt", "insert-heads"))
_ATTENTION, _TOKENS = "insert-attention", "insert-tokens"
_SAYS = {Role.MASK: "mask", Role.POSITIONS: "positions", Role.TOKENS: "ids", Role.EMBEDDINGS: "embeddings"}
_TEXT = ("ids", "embeddings")  # what is put in its place there is drawn
_SHOWN = 4  # operators that a node names
_PROMPT = 3  # axes of a prompt for every row

Lines = tuple[str, ...]
Roles = dict[fx.Node, str]


def is_front(node: fx.Node) -> bool:
    """Whether a pass made the node that puts something in front of what a graph reads."""
    origin = origin_of(node)
    return origin is not None and origin.made_by in _FRONTS


def is_cached(node: fx.Node) -> bool:
    """Whether the node belongs to keys and values in front that an adapter computes."""
    origin = origin_of(node)
    return is_front(node) and origin is not None and origin.position is not None and origin.site == "@cache"


def is_inserted(node: fx.Node) -> bool:
    """Whether the node belongs to what is inserted beside weights: in front, in attention, or rows of tokens."""
    origin = origin_of(node)
    return origin is not None and (origin.made_by in _FRONTS or origin.made_by in (_ATTENTION, _TOKENS))


def is_cut(node: fx.Node) -> bool:
    """Whether the node leaves what a model says of virtual tokens out of an output."""
    origin = origin_of(node)
    if origin is None or origin.made_by != "insert-prompt" or name_of(node) != "slice":
        return False
    return bool(node.args[1] == 1) and any(user.op == "output" for user in node.users)


def is_text(source: fx.Node) -> bool:
    """Whether an input is the text itself, rather than its mask or positions."""
    return source.op == "placeholder" and _title(source) in _TEXT


def is_attention(members: Sequence[fx.Node]) -> bool:
    """Whether this is attention to learned prompts."""
    return any(origin is not None and origin.made_by == _ATTENTION for origin in map(origin_of, members))


def is_rows(members: Sequence[fx.Node]) -> bool:
    """Whether these are trained rows of tokens."""
    return any(origin is not None and origin.made_by == _TOKENS for origin in map(origin_of, members))


def sources(nodes: Sequence[fx.Node], own: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """What each of `own`, nodes that make an input longer, makes longer: the node of the base that it comes from.

    One that starts from nothing, such as positions that are counted, belongs to what it is used with.
    """
    found: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node in own:
            inputs = [each for each in node.all_input_nodes if holds_tensor(each)]
            started = [found[each] if each in own else each for each in inputs if each not in own or each in found]
            if started:
                found[node] = started[0]
    for node in reversed(nodes):
        if node in own and node not in found:
            used = [found[each] for each in node.users if each in found]
            if used:
                found[node] = used[0]
    return found


def widened_label(members: Sequence[fx.Node], source: fx.Node) -> tuple[str, Lines]:
    """Title and lines of what makes an input of the base longer, or an output as long as it was."""
    calls = [each for each in members if each.op == "call_function"]
    cut = next(filter(is_cut, calls), None)
    if cut is not None:
        return "text only", (f"without the first {cut.args[2]}",)
    if is_front(source):
        return "padding first", ("then virtual tokens, then text",)
    title = _title(source)
    for each in calls:
        if name_of(each) == "cat":
            said = "room for {} in front" if title in _TEXT else "{} more in front"
            return title, (said.format(_length(each)),)
    shift = next((each.args[1] for each in calls if name_of(each) == "add" and isinstance(each.args[1], int)), None)
    return title, () if shift is None else (f"{shift} further on",)


def adapter_lines(members: Sequence[fx.Node], roles: Roles) -> Lines:
    """What an adapter's part in front says: how many virtual tokens, its tensors, what is done with them."""
    origin = origin_of(members[0])
    calls = [each for each in members if each.op == "call_function" and holds_tensor(each)]
    tensors = [f"{role} {shape_of(each)}" for each, role in roles.items() if shape_of(each)]
    steps = [name_of(each) for each in calls if not is_plumbing(each) and name_of(each) != "index_select"]
    distinct = list(dict.fromkeys(SYMBOLS.get(each, each) for each in steps))
    shown = distinct if len(distinct) <= _SHOWN else [*distinct[: _SHOWN - 1], "…"]
    what = "keys and values" if origin is not None and origin.site == "@cache" else "prompt"
    # The last such node: an expression may have some of its own.
    lead = next((each for each in reversed(calls) if name_of(each) in ("unsqueeze", "index_select")), None)
    if lead is not None and lead.meta["val"].dim() == _PROMPT:
        what += f" of {_counted(lead.meta['val'].shape[1], 'virtual token')}"
    return (what, *tensors, *([", ".join(shown)] if shown else []))


def attention_lines(members: Sequence[fx.Node], roles: Roles) -> Lines:
    """What attention to learned prompts says: the base's projections that it goes through, and the gate."""
    steps: list[str] = []
    projected: list[str] = []
    for call in (each for each in members if each.op == "call_function" and holds_tensor(each)):
        read = [_read(each) for each in call.all_input_nodes]
        modules = [str(each.target).split(".")[-2] for each in read if each not in roles and each.op == "get_attr"]
        match name_of(call):
            case "linear" | "matmul" if not steps:
                projected += modules
            case "linear" | "matmul":
                steps += modules
            case name if name == ATTENTION:
                steps.append(f"{', '.join(dict.fromkeys(projected))} of them; attention")
            case "mul":
                steps.append(" ".join((TIMES, *(roles[each] for each in read if each in roles))))
    tensors = ", ".join(f"{role} {shape_of(each)}" for each, role in roles.items())
    return ("attention to learned prompts", tensors, *steps)


def rows_lines(members: Sequence[fx.Node], roles: Roles) -> Lines:
    """What trained rows of tokens say."""
    names = {name_of(each) for each in members if each.op == "call_function"}
    done = "in place of the base's" if "where" in names else "put into W"
    if "index_add" in names:
        done = "for their logits"
    rows = next((each for each, role in roles.items() if role.endswith("rows")), None)
    if rows is None:
        return ("rows of tokens", done)
    return (f"rows {shape_of(rows)}", f"of {_counted(rows.meta['val'].shape[0], 'token')}, {done}")


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _read(node: fx.Node) -> fx.Node:
    """What a tensor is a piece or a form of."""
    while node.op == "call_function" and is_plumbing(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _title(source: fx.Node) -> str:
    if source.op == "placeholder":
        return _SAYS.get(spec_of(source).role, str(source.target).replace("_", " "))
    value = source.meta.get("val")
    return "positions" if isinstance(value, torch.Tensor) and value.dtype == torch.int64 else "mask"


def _length(cat: fx.Node) -> int | str:
    parts = cat.args[0]
    axis = cat.args[1] if len(cat.args) > 1 else 0
    first = parts[0] if isinstance(parts, Sequence) else parts
    if not isinstance(first, fx.Node) or not isinstance(axis, int):
        return "some"
    size = first.meta["val"].shape[axis]
    return int(size) if isinstance(size, int) else "some"
