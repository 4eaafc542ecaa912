"""Which fx nodes are drawn as one: the adapters' parts, modules that do one thing, plumbing with its source."""

from dataclasses import dataclass, field

import torch
from torch import fx

from peftc.compiler.diagram.front import is_cut, is_front, is_inserted, is_text, sources
from peftc.compiler.diagram.operators import (
    MAJOR,
    holds_tensor,
    is_empty,
    is_plumbing,
    name_of,
    origin_of,
    tensor_inputs,
)
from peftc.compiler.diagram.partition import Partition
from peftc.compiler.diagram.scope import scopes

MULTIPLE = 2


@dataclass
class Grouping:
    """The groups, and what was found out on the way.

    `position` holds the adapter a rewritten node belongs to, `joins` the nodes where adapters meet the base, `data` the
    nodes that depend on weights or float inputs rather than on masks and positions alone, and `leaves` the module calls
    that are drawn as one node. `widened` are the nodes that make room for what is put in front, each with what of the
    base it makes longer, and `led` the joins that put something in front.
    """

    partition: Partition
    position: dict[fx.Node, int] = field(default_factory=dict)
    joins: set[fx.Node] = field(default_factory=set)
    data: set[fx.Node] = field(default_factory=set)
    leaves: set[str] = field(default_factory=set)
    widened: dict[fx.Node, fx.Node] = field(default_factory=dict)
    led: set[fx.Node] = field(default_factory=set)


def group(graph: fx.Graph) -> Grouping:
    """Group the nodes of a graph. Every node is in exactly one group."""
    nodes = list(graph.nodes)
    grouping = Grouping(Partition(nodes))
    _adapters(nodes, grouping)
    _fronts(nodes, grouping)
    _data(nodes, grouping)
    _leaves(nodes, grouping)
    _absorb_plumbing(nodes, grouping)
    _merge_alike(nodes, grouping)
    _merge_neighbours(nodes, grouping)
    _absorb_weights(nodes, grouping)
    return grouping


def _adapters(nodes: list[fx.Node], grouping: Grouping) -> None:
    """Each rewritten node is of the latest adapter it depends on; a sum of the base's and an adapter's is a join."""
    for node in nodes:
        origin = origin_of(node)
        if origin is None:
            continue
        inputs = [each for each in node.all_input_nodes if origin_of(each) is not None]
        own = [] if origin.position is None else [origin.position]
        found = [grouping.position[each] for each in inputs if each in grouping.position] + own
        if found:
            grouping.position[node] = max(found)
        if name_of(node) == "add" and len(node.all_input_nodes) == MULTIPLE:
            left, right = node.all_input_nodes
            base = left not in grouping.position or left in grouping.joins
            if base and right in grouping.position and right not in grouping.joins:
                grouping.joins.add(node)


def _fronts(nodes: list[fx.Node], grouping: Grouping) -> None:
    """Where something is put in front, and what is made longer for it."""
    own: set[fx.Node] = set()
    behind: set[fx.Node] = set()  # what something was put in front of, moved about
    last: dict[str, int] = {}
    for node in nodes:
        origin = origin_of(node)
        if origin is None or not is_front(node) or not holds_tensor(node):
            continue
        inputs = tensor_inputs(node)
        follows = any(each in behind for each in inputs)
        found = {grouping.position.get(each) if is_front(each) else None for each in inputs}
        if node in grouping.position:
            last[origin.made_by] = max(last.get(origin.made_by, 0), grouping.position[node])
        if name_of(node) == "cat" and (follows or len(found) > 1):
            grouping.joins.add(node)
            grouping.led.add(node)
            behind.add(node)
        elif follows and is_plumbing(node):
            behind.add(node)
        elif origin.position is None and (follows or node not in grouping.position):
            grouping.position.pop(node, None)
            moved = is_plumbing(node) and not any(each in own for each in inputs)  # a piece of what the base has
            if node.op == "call_function" and (is_cut(node) or not moved):
                own.add(node)
    grouping.widened = sources(nodes, own)
    for node in grouping.widened:
        origin = origin_of(node)
        assert origin is not None
        grouping.position[node] = last.get(origin.made_by, 0)


def _data(nodes: list[fx.Node], grouping: Grouping) -> None:
    for node in nodes:
        value = node.meta.get("val")
        if node.op in ("placeholder", "get_attr"):
            floating = isinstance(value, torch.Tensor) and value.is_floating_point() and not is_empty(node)
            starts = floating and (node.op == "placeholder" or len(value.shape) > 1)  # type: ignore[union-attr]
        else:
            starts = node.op == "output" or (origin_of(node) is not None and node not in grouping.widened)
        # How long the past is says nothing of what it holds: sizes carry no data.
        inputs = [each for each in node.all_input_nodes if holds_tensor(each)]
        starts = starts or (node in grouping.widened and is_text(grouping.widened[node]))
        if starts or any(each in grouping.data for each in inputs):
            grouping.data.add(node)


def is_major(node: fx.Node) -> bool:
    """An operator worth a node of its own: a known one, or any that reads a matrix of weights."""
    if node.op != "call_function" or is_plumbing(node) or not holds_tensor(node):
        return False
    name = name_of(node)
    return name in MAJOR or name.startswith("conv") or any(_is_matrix(each) for each in tensor_inputs(node))


def _is_matrix(node: fx.Node) -> bool:
    """A weight, also one that is moved about or adapted on the way."""
    while node.op == "call_function" and (is_plumbing(node) or origin_of(node) is not None) and tensor_inputs(node):
        if is_inserted(node):
            return False
        node = tensor_inputs(node)[0]
    value = node.meta.get("val")
    return node.op == "get_attr" and isinstance(value, torch.Tensor) and value.dim() > 1 and value.is_floating_point()


def _leaves(nodes: list[fx.Node], grouping: Grouping) -> None:
    """Modules that call no module and hold at most one piece of work."""
    inner: dict[str, int] = {}
    calls: set[str] = set()
    for node in nodes:
        around = scopes(node)
        if not around:
            continue
        calls.update(each.path for each in around[:-1])
        work = is_major(node) and origin_of(node) is None
        inner[around[-1].path] = inner.get(around[-1].path, 0) + int(work)
    grouping.leaves = {path for path, work in inner.items() if path and path not in calls and work <= 1}


def _merge_alike(nodes: list[fx.Node], grouping: Grouping) -> None:
    """One group for an adapter's nodes at a site, for the joins there, and for a leaf module's own nodes."""
    latest: dict[tuple[object, ...], fx.Node] = {}
    for node in nodes:
        key = _key(node, grouping)
        if key is None:
            continue
        if key in latest:
            grouping.partition.merge(latest[key], node)
        latest[key] = node


def _key(node: fx.Node, grouping: Grouping) -> tuple[object, ...] | None:
    if is_plumbing(node) and len(grouping.partition.members(node)) > 1:
        return None
    around = scopes(node)
    origin = origin_of(node)
    if origin is not None:
        call = around[-1].path if around else ""
        if node in grouping.led:
            return "led", origin.site, reader(node)
        if node in grouping.widened:
            return "widened", origin.made_by, grouping.widened[node], call, is_cut(node)
        if node in grouping.joins:
            return "join", origin.site, call
        return ("adapter", origin.site, call, grouping.position[node]) if node in grouping.position else None
    if node.op == "call_function" and around and around[-1].path in grouping.leaves and holds_tensor(node):
        return "leaf", around[-1].path
    return None


def reader(node: fx.Node) -> str:
    """The module call that reads a node: what is put in front stands there."""
    around = scopes(node)
    if around:
        return around[-1].path
    users = [scopes(each) for each in node.users if holds_tensor(each)]
    return next((each[-1].path for each in users if each), "")


def _absorb_plumbing(nodes: list[fx.Node], grouping: Grouping) -> None:
    """A reshaped result is drawn as the result."""
    partition = grouping.partition
    for node in nodes:
        alone = len(partition.members(node)) == 1
        inputs = tensor_inputs(node)
        if not (alone and inputs and node.op == "call_function" and is_plumbing(node) and holds_tensor(node)):
            continue
        if node in grouping.led or is_cut(node):
            continue
        # A weight that the base moves about goes with the operator that reads it in the end.
        if inputs[0].op != "get_attr" or origin_of(inputs[0]) is not None or origin_of(node) is not None:
            partition.absorb(node, inputs[0])


def _merge_neighbours(nodes: list[fx.Node], grouping: Grouping) -> None:
    """Small operators of one module that feed one another, such as those of a rotation or a mask."""
    partition = grouping.partition
    for node in nodes:
        if not _is_minor(node, grouping):
            continue
        for each in tensor_inputs(node):
            source = _behind_plumbing(each)
            near = source in grouping.data if node in grouping.data else source not in grouping.data
            if near and _is_minor(source, grouping) and scopes(source)[-1:] == scopes(node)[-1:]:
                partition.merge(source, node)


def _is_minor(node: fx.Node, grouping: Grouping) -> bool:
    if node.op != "call_function" or origin_of(node) is not None or not holds_tensor(node):
        return False
    around = scopes(node)
    if around and around[-1].path in grouping.leaves:
        return False
    return not is_major(node) and not is_plumbing(node)


def _behind_plumbing(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and is_plumbing(node) and origin_of(node) is None and tensor_inputs(node):
        node = tensor_inputs(node)[0]
    return node


def _absorb_weights(nodes: list[fx.Node], grouping: Grouping) -> None:
    """Weights go with the operator that reads them, sizes with the tensor they are of; what is left, with its user.

    A weight that adapters read is drawn: there is something to see.
    """
    partition = grouping.partition
    for node in nodes:
        if node.op == "call_function" and not holds_tensor(node) and node.all_input_nodes:
            partition.absorb(node, node.all_input_nodes[0])
    for node in reversed(nodes):
        if len(partition.members(node)) > 1 or origin_of(node) is not None or not node.users:
            continue
        users = [user for user in node.users if user.op != "output"]
        read = node.op == "get_attr" and not any(origin_of(user) is not None for user in users)
        left = node.op == "call_function" and (not holds_tensor(node) or is_empty(node) or is_plumbing(node))
        if users and (read or left):
            partition.absorb(node, users[0])
    _absorb_unused(nodes, grouping)


def _absorb_unused(nodes: list[fx.Node], grouping: Grouping) -> None:
    """Constants that nothing reads, which the exporter leaves behind, go with the output rather than stand about."""
    partition = grouping.partition
    output = next((node for node in nodes if node.op == "output"), None)
    for members in partition.groups():
        idle = all(each.op == "get_attr" or (each.op == "call_function" and is_plumbing(each)) for each in members)
        used = any(partition.of(user) is not partition.of(each) for each in members for user in each.users)
        if output is not None and idle and not used:
            partition.absorb(members[0], output)
