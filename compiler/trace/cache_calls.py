"""Puts the calls that a layer makes of its cache into its graph, traced with what the cache gives as inputs."""

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import networkx as nx
import torch
from torch import fx

from peftc.compiler.trace.outside import UntraceableError
from peftc.passes.ir.cache_update import update_cache
from peftc.passes.ir.infer import is_same_size
from peftc.passes.ir.inputs import InputSpec, describe
from peftc.runtime.regions.region import Update
from peftc.runtime.regions.within import HEAD


def call_cache(graph: fx.Graph, updates: Sequence[Update], count: int, outputs: int) -> None:
    """f(x, K, V), k, v  ->  f(x, update(cache, k, v)), which takes the cache as an input.

    `count` are the inputs before what the cache gives, `outputs` the outputs before what it is given.

    Raises UntraceableError where what the cache is given depends on what it gives.
    """
    (output,) = graph.find_nodes(op="output")
    placeholders = list(graph.find_nodes(op="placeholder"))
    cached = placeholders[count:]
    places = {node: at for at, node in enumerate(graph.nodes)}
    with graph.inserting_after(placeholders[-1]):
        cache = graph.placeholder("cache")
    cache.meta["val"] = None
    describe(cache, InputSpec("cache"))
    last = placeholders[-1]
    for at, update in enumerate(updates):
        keys, values = _leaves(output)[outputs + 2 * at :][:2]
        # Where the layer's own code calls its cache: in whatever other order nodes were, gradients would be summed in
        # another one than those of a graph of the whole model.
        last = max(last, keys, values, key=places.__getitem__)
        with graph.inserting_before(last.next):
            node = _update(graph, cache, update, keys, values, cached[2 * at : 2 * at + 2])
        places |= dict.fromkeys((node, *node.users), places[last])
        last = node
    output.args = (tuple(_leaves(output)[:outputs]),)
    for each in cached:
        graph.erase_node(each)
    _sort(graph)


def _leaves(output: fx.Node) -> Any:
    """What the graph gives, as it is now: what stands for a cache's keys and values may be among it."""
    return output.args[0]


def _update(
    graph: fx.Graph, cache: fx.Node, update: Update, keys: fx.Node, values: fx.Node, taken: Sequence[fx.Node]
) -> fx.Node:
    """A call of the cache, in the place of the inputs that stand for what it gives."""
    index: Any = update.index
    if isinstance(index, str):
        index = graph.create_node("get_attr", f"{HEAD}.{index}")
        index.meta["val"] = 0
    node = graph.call_function(update_cache, (cache, keys, values, index))
    node.meta["val"] = tuple(each.meta["val"] for each in taken)
    for part, each in enumerate(taken):
        got = graph.call_function(operator.getitem, (node, part))
        got.meta["val"] = each.meta["val"]
        each.replace_all_uses_with(got)
    stack = keys.meta.get("nn_module_stack")
    if stack is not None:
        for each in (node, *node.users):
            each.meta["nn_module_stack"] = stack
    return node


def _sort(graph: fx.Graph) -> None:
    """Put every node after its operands, otherwise in the order that there is. Raises UntraceableError for a circle."""
    places = {node: at for at, node in enumerate(graph.nodes)}
    uses = nx.DiGraph()
    uses.add_nodes_from(places)
    uses.add_edges_from((each, node) for node in places for each in node.all_input_nodes)
    try:
        order = list(nx.lexicographical_topological_sort(uses, key=places.__getitem__))
    except nx.NetworkXUnfeasible as error:
        raise UntraceableError("what it asks of its cache depends on what the cache gives") from error
    last = graph._root
    for node in order:
        last.append(node)
        last = node


def measured(graph: fx.Graph, updates: Sequence[Update]) -> tuple[Update, ...]:
    """The updates with what their sizes are, where inputs tell."""
    inputs = [node.meta["val"] for node in graph.find_nodes(op="placeholder") if node.meta["val"] is not None]
    nodes = [node for node in graph.nodes if node.target is update_cache]

    def found(size: Any) -> tuple[int, int] | int | None:
        if isinstance(size, int):
            return size
        for at, value in enumerate(inputs):
            for axis, other in enumerate(value.shape):
                if isinstance(other, torch.SymInt) and is_same_size(size, other):
                    return at, axis
        return None

    result = []
    for update, node in zip(updates, nodes, strict=True):
        keys = node.args[1].meta["val"]
        sizes = tuple(tuple(map(found, value.shape)) for value in node.meta["val"])
        result.append(replace(update, tokens=found(keys.shape[2]), sizes=sizes))
    return tuple(result)
