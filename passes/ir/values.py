"""Whether nodes hold what their operands make of them, and how to make it so after operands changed.

A node whose value was found right is marked with all that the finding rests on: what it calls, its constants, and the
value objects of its operands and its own. While these stay, copies of the graph included, it is not looked at again.
"""

from collections.abc import Iterator
from typing import Any

from torch import fx

from peftc.passes.ir.emit import mode_of
from peftc.passes.ir.infer import agree, described, infer, inferred_type, is_effect, operator_of, why_not

_MARK = "found_right"
_PLAIN = (str, bool, int, float)


def wrong_value(node: fx.Node, *, full: bool = False, right: set[Any] | None = None) -> str | None:
    """What is wrong with a node's value, or None. With `full` a node that was found right is looked at again.

    `right` gathers what was found right, so that layers of one making cost one; it is of use while the values live.
    """
    if node.op != "call_function":
        return None
    seen = _seen(node)
    if not full and _is_marked(node, seen):
        return None
    key = tuple((type(each), each) if isinstance(each, _PLAIN) else id(each) for each in seen)
    if right is not None and key in right:
        node.meta[_MARK] = seen
        return None
    if why_not(node) is not None:
        return None
    args, kwargs = operands(node)
    try:
        inferred = inferred_type(operator_of(node), args, kwargs, _mode(node))
    except Exception as error:  # whatever an operator says of operands it does not take
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"node {node} calls {node.target} with what it does not take: {lines[0]}"
    if not agree(node.meta["val"], inferred):
        return f"node {node} holds {described(node.meta['val'])}, but {node.target} gives {described(inferred)}"
    node.meta[_MARK] = seen
    if right is not None:
        right.add(key)
    return None


def refresh(graph: fx.Graph) -> int:
    """Give every node that reads something else than it did the value that it has now. Returns how many have another.

    What an operator with graphs for operands gives is left as it is: see `why_not`.
    """
    changed = 0
    for node in graph.nodes:
        if node.op != "call_function" or is_effect(node) or _is_marked(node, _seen(node)):
            continue
        args, kwargs = operands(node)
        value = infer(operator_of(node), args, kwargs, _mode(node))
        if not agree(node.meta["val"], value):
            node.meta["val"] = value
            changed += 1
    return changed


def operands(node: fx.Node) -> tuple[Any, Any]:
    """The values that a node calls its operator with."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
    return args, kwargs


def _mode(node: fx.Node) -> Any:
    return mode_of(node.args, node.kwargs) or mode_of(node)


def _seen(node: fx.Node) -> tuple[Any, ...]:
    return (node.target, operator_of(node), node.meta["val"], *_leaves(node.args), *_leaves(node.kwargs))


def _leaves(argument: Any) -> Iterator[Any]:
    if isinstance(argument, fx.Node):
        yield argument.meta.get("val")
    elif isinstance(argument, tuple | list):
        yield len(argument)
        for each in argument:
            yield from _leaves(each)
    elif isinstance(argument, dict):
        for name, each in argument.items():
            yield name
            yield from _leaves(each)
    else:
        yield argument


def _is_marked(node: fx.Node, seen: tuple[Any, ...]) -> bool:
    before = node.meta.get(_MARK)
    return before is not None and len(before) == len(seen) and all(map(_is_one, before, seen))


def _is_one(one: Any, two: Any) -> bool:
    if one is two:
        return True
    return isinstance(one, _PLAIN) and type(one) is type(two) and one == two
