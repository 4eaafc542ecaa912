"""Cuts a graph at its layers, so that each layer's activations are computed again in the backward pass."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from peftc.passes.optimize.native import NATIVE

aten = torch.ops.aten

OPTIONS = frozenset({"preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"})
"""What `torch.utils.checkpoint.checkpoint` can be told, as far as it is for users to tell."""

_LONG = {native: op for op, native in NATIVE.items()}

# These may give their operand back as it is, or write to operands, and their schemas do not say so.
_PASS_ON = frozenset({aten.dropout.default})
_RUNNING = {aten.batch_norm.default: ((3, 4), 5), aten.instance_norm.default: ((3, 4), 5)}


@dataclass(frozen=True)
class Recompute:
    """How layers are computed again: every which one, what torch's checkpoint is told, whether inputs leave the device.

    `options` are the keyword arguments of `torch.utils.checkpoint.checkpoint`.
    """

    every: int = 1
    offload: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def run(self, function: Callable[..., Any], values: tuple[Any, ...]) -> Any:
        """Call the function; what it keeps for its gradient is dropped, and made again from `values`."""
        with self._holding():
            return checkpoint(function, *values, use_reentrant=False, **dict(self.options))

    def _holding(self) -> AbstractContextManager[Any]:
        if not self.offload:
            return nullcontext()
        device = torch.accelerator.current_accelerator()
        return save_on_cpu(pin_memory=device is not None, device_type="cpu" if device is None else device.type)


def layer_names(model: nn.Module) -> tuple[str, ...]:
    """The repeated layers of a model, in order, the outermost: those transformers marks, or members of ModuleLists."""
    named = dict(model.named_modules(remove_duplicate=False))
    found = [name for name, each in named.items() if isinstance(each, GradientCheckpointingLayer)]
    if not found:
        lists = [name for name, each in named.items() if isinstance(each, nn.ModuleList)]
        found = [name for name in named if name.rpartition(".")[0] in lists and name.rpartition(".")[1]]
    known = set(found)
    return tuple(each for each in found if known.isdisjoint(_parents(each)))


def stitched(graph: fx.Graph, layers: tuple[str, ...], root: object, recompute: Recompute) -> Callable[..., Any]:
    """A function like the one that Python makes of the graph, with layers recomputed. The graph stays as it is.

    It takes `root`, from which the graph reads weights, and the graph's inputs. A segment is given the very tensors its
    weights are at the time of the call: what is activated or replaced before the backward pass does not matter.
    """
    order = late(graph)
    home = {node: segment for segment in segments(order, layers, recompute.every) for node in segment.nodes}
    names = Namespace()
    names.__dict__.update(root.__dict__)
    outer = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in order:
        segment = home.get(node)
        if segment is None:
            copied[node] = outer.node_copy(node, copied.__getitem__)
        elif node is segment.nodes[-1]:
            name = f"segment_{len(names.__dict__)}"
            setattr(names, name, _runner(segment, recompute))
            weights = tuple(copied[each] for each in segment.weights)
            result = outer.create_node("call_module", name, (weights, *(copied[each] for each in segment.values)))
            for index, each in enumerate(segment.results):
                copied[each] = outer.call_function(operator.getitem, (result, index))
    forward = python_function(outer)
    return lambda *tensors: forward(names, *tensors)


@dataclass
class Segment:
    """Nodes of one call of a layer, one behind the other, and what crosses their border."""

    layer: str
    nodes: list[fx.Node] = field(default_factory=list)
    weights: list[fx.Node] = field(default_factory=list)
    values: list[fx.Node] = field(default_factory=list)
    results: list[fx.Node] = field(default_factory=list)

    def close(self) -> "Segment":
        """Find out what crosses."""
        inside = set(self.nodes)
        crossing = {each: None for node in self.nodes for each in node.all_input_nodes if each not in inside}
        self.weights = [each for each in crossing if each.op == "get_attr"]
        self.values = [each for each in crossing if each.op != "get_attr"]
        self.results = [node for node in self.nodes if any(user not in inside for user in node.users)]
        return self


def late(graph: fx.Graph) -> list[fx.Node]:
    """The nodes in an order in which what weights alone decide comes right before its first reader.

    So a layer's computed weights are made in its segment, and need not be kept. Random numbers are drawn in the order
    of the graph.
    """
    written = _written(graph.nodes)
    movable: set[fx.Node] = set()
    for node in graph.nodes:
        known = all(each in movable or each.op == "get_attr" for each in node.all_input_nodes)
        if known and _is_pure(node) and not any(_origin(each) in written for each in node.all_input_nodes):
            movable.add(node)
    order: dict[fx.Node, None] = {}

    def place(node: fx.Node) -> None:
        for each in node.all_input_nodes:
            if each in movable and each not in order:
                place(each)
        order[node] = None

    for node in graph.nodes:
        if node not in movable:
            place(node)
    return list(order)


def segments(order: Sequence[fx.Node], layers: tuple[str, ...], every: int = 1) -> list[Segment]:
    """The segments of a graph that can be computed twice, of every so many layers.

    What something later writes to in place cannot go into a segment, which would find it changed: a layer that updates
    running statistics runs once.
    """
    chosen = frozenset(layers[::every])
    place = {node: index for index, node in enumerate(order)}
    written = {origin: place[last] for origin, last in _written(order).items()}
    found = [each.close() for each in _runs(order, frozenset(layers)) if each.layer.partition("@")[0] in chosen]
    return [
        segment
        for segment in found
        if all(written.get(_origin(each), -1) < place[segment.nodes[0]] for each in segment.weights + segment.values)
    ]


def writes_outside(graph: fx.Graph) -> bool:
    """Whether a graph writes to what it did not make, such as running statistics: it is not one that can run twice."""
    origins = [_origin(each) for node in graph.nodes for each in _targets(node)]
    return any(isinstance(each, str) or (isinstance(each, fx.Node) and each.op == "placeholder") for each in origins)


def python_function(graph: fx.Graph) -> Callable[..., Any]:
    """The function that Python makes of a graph; its first argument is what weights are read from."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<adapted graph>", "exec"), scope)
    return scope["forward"]


class Namespace:
    """Attributes, kept in a dictionary of our choice."""


def _runner(segment: Segment, recompute: Recompute) -> Callable[..., Any]:
    body = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for each in (*segment.weights, *segment.values):
        copied[each] = body.placeholder(each.name)
    for node in segment.nodes:
        copied[node] = body.node_copy(node, copied.__getitem__)
    body.output(tuple(copied[each] for each in segment.results))
    function = python_function(body)

    # Weights are bound rather than passed: the checkpoint keeps what it is passed as it keeps activations.
    def run(weights: tuple[torch.Tensor, ...], *values: Any) -> Any:
        return recompute.run(partial(function, None, *weights), values)

    return run


def _runs(order: Sequence[fx.Node], layers: frozenset[str]) -> Iterator[Segment]:
    """Nodes of one layer's call up to the next one's; nodes of none in between, sizes mostly, go with it."""
    current, waiting = Segment(""), list[fx.Node]()
    for node in order:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        layer = _layer(node, layers)
        if layer == current.layer and current.nodes:
            current.nodes += [*waiting, node]
            waiting = []
        elif layer:
            if current.nodes:
                yield current
            current, waiting = Segment(layer, [node]), []
        else:
            waiting.append(node)
    if current.nodes:
        yield current


def _layer(node: fx.Node, layers: frozenset[str]) -> str:
    """The layer and which of its calls a node came from, empty for none."""
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    for key, (path, _) in stack.items():
        if path in layers:
            return f"{path}@{key.rpartition('@')[2]}" if "@" in key else path
    return ""


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


def _written(nodes: Iterable[fx.Node]) -> dict[object, fx.Node]:
    """What is written to in place, by origin, and the last to do so."""
    return {_origin(each): node for node in nodes for each in _targets(node)}


def _origin(node: fx.Node) -> object:
    """What a value's storage is, or may be, that of: a node that makes its own; for a weight, its name."""
    while (source := _shared(node)) is not None:
        node = source
    return str(node.target) if node.op == "get_attr" else node


def _shared(node: fx.Node) -> fx.Node | None:
    """The operand whose storage the result may share."""
    if node.op != "call_function":
        return None
    op = _LONG.get(node.target, node.target)  # type: ignore[arg-type]
    if op is operator.getitem or op in _PASS_ON:
        return node.all_input_nodes[0]
    for argument, value in _arguments(node, op):
        if argument.alias_info is not None and isinstance(value, fx.Node):
            return value
    return None


def _targets(node: fx.Node) -> Iterator[fx.Node]:
    """The operands that an operator writes to."""
    if node.op != "call_function":
        return
    op = _LONG.get(node.target, node.target)  # type: ignore[arg-type]
    for argument, value in _arguments(node, op):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
            yield value
    if op in _RUNNING:
        statistics, training = _RUNNING[op]
        if node.args[training]:
            yield from (each for each in (node.args[at] for at in statistics) if isinstance(each, fx.Node))


def _is_pure(node: fx.Node) -> bool:
    """Whether it is all the same when an operator runs."""
    op = _LONG.get(node.target, node.target)  # type: ignore[arg-type]
    if op is operator.getitem:
        return True
    if not isinstance(op, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in op.tags:
        return False
    return op not in _RUNNING and not op._schema.is_mutable


def _arguments(node: fx.Node, op: object) -> Iterator[tuple[Any, Any]]:
    """The operands of an operator, each with what its schema says of it."""
    if not isinstance(op, torch._ops.OpOverload):
        return
    for index, argument in enumerate(op._schema.arguments):
        yield argument, node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
