"""Operators whose operands are graphs of their own (`wrap_with_autocast`, `cond`): what the graphs in them use."""

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

INNER = "inner_paths"
"""The metadata of such an operator: for each operand that is a tensor, the modules that use it in the bodies."""

_SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled


def inline_gradient_blocks(graph: fx.Graph, owner: torch.nn.Module) -> None:
    """set_grad_enabled(flag, f, x)  ->  f(x): a graph is run in the caller's mode. `owner` has the bodies."""
    for node in list(graph.nodes):
        if node.target is not _SET_GRAD:
            continue
        body, *operands = node.args[1:]
        inner = _body(owner, body)
        placeholders = inner.find_nodes(op="placeholder")
        known = dict(zip(placeholders, operands, strict=True))
        with graph.inserting_before(node):
            for each in inner.nodes:
                if each.op in ("placeholder", "output"):
                    continue
                known[each] = made = graph.node_copy(each, known.__getitem__)
                if each.op == "get_attr":
                    made.target = f"{body.target}.{each.target}"
        (output,) = inner.find_nodes(op="output")
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(known[output.args[0][user.args[1]]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not body.users:
            graph.erase_node(body)


def tell_inner_uses(graph: fx.Graph, owner: torch.nn.Module) -> None:
    """Let each operator with bodies know which modules use its operands in there: `used_by` reads it."""
    for node in graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            node.meta[INNER] = _inner(node, owner)


def used_by(user: fx.Node, operand: fx.Node) -> tuple[str, ...]:
    """The modules in which a node uses an operand, outermost first.

    Branches of conditions do not say where they were traced; a tensor is used there by the module that holds it.
    """
    paths = list(module_path(user))
    inner: dict[int, tuple[str, ...]] = user.meta.get(INNER, {})
    for at, each in enumerate(_operands(user)) if inner else ():
        if each is operand and at in inner:
            paths += inner[at] or (str(operand.target).rpartition(".")[0],)
    return tuple(dict.fromkeys(paths))


def module_path(node: fx.Node) -> tuple[str, ...]:
    """The modules a node was traced in, outermost first, without the exporter's `@n` suffix for repeated calls."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(str(path).split("@")[0] for path, _ in stack.values())


def _inner(node: fx.Node, owner: torch.nn.Module) -> dict[int, tuple[str, ...]]:
    operands = _operands(node)
    found: dict[int, dict[str, None]] = {}
    for each in operands:
        if not _is_body(each, owner):
            continue
        inner = _body(owner, each)
        nested = owner.get_submodule(str(each.target))
        placeholders = inner.find_nodes(op="placeholder")
        first = len(operands) - len(placeholders)  # bodies come first, what they are given last
        for at, placeholder in enumerate(placeholders):
            for user in placeholder.users:
                if isinstance(user.target, HigherOrderOperator):
                    user.meta.setdefault(INNER, _inner(user, nested))
                found.setdefault(first + at, {}).update(dict.fromkeys(used_by(user, placeholder)))
    return {at: tuple(paths) for at, paths in found.items()}


def _operands(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda each: found.append(each))
    return found


def _is_body(node: fx.Node, owner: torch.nn.Module) -> bool:
    if node.op != "get_attr":
        return False
    value: Any = owner
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return isinstance(value, fx.GraphModule)


def _body(owner: torch.nn.Module, node: fx.Node) -> fx.Graph:
    body = owner.get_submodule(str(node.target))
    assert isinstance(body, fx.GraphModule)
    return body.graph
