"""Lifts what a graph reads to inputs, under sizes of its own: the form in which a graph leaves the house.

A trace has symbols for its sizes that nobody named, with whatever bounds the tracer happened to find. Here every size
is a sum of dimensions with a name and a range (`batch`, `past + sequence`), and the values are propagated anew.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, compute_unbacked_bindings
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from peftc.passes.ir.infer import infer, operator_of
from peftc.passes.ir.inputs import InputSpec, Size, describe, spec_of
from peftc.passes.ir.pass_manager import Change
from peftc.passes.ir.roles import Role
from peftc.passes.ir.stages import Stage
from peftc.passes.ir.values import operands

_VIEWS = frozenset((torch.ops.aten.view.default, torch.ops.aten.reshape.default))


@dataclass(frozen=True)
class Dimension:
    """A size that varies: its name, one it may have (2 or more, and no other dimension's), and its range.

    `high` is None where there is no limit.
    """

    name: str
    sample: int
    low: int = 1
    high: int | None = None


class BoundError(Exception):
    """The graph holds for some sizes only; `reasons` are the conditions it asks of them ("past < 16")."""

    def __init__(self, reasons: Sequence[str]):
        self.reasons = tuple(reasons)
        super().__init__("; ".join(reasons))

    @property
    def limits(self) -> dict[str, int] | None:
        """The largest size of each dimension that is asked for, if nothing else is."""
        found: dict[str, int] = {}
        for each in self.reasons:
            match = re.fullmatch(r"(\w+) (<=?) (\d+)", each)
            if match is None:
                return None
            high = int(match[3]) - (match[2] == "<")
            found[match[1]] = min(high, found.get(match[1], high))
        return found


@dataclass
class Lifted:
    """A graph whose placeholders are first the tensors it reads, then its inputs; every node has its value.

    `tensors` are the values of the former with their names, `inputs` the latter by name.
    """

    graph: fx.Graph
    mode: FakeTensorMode
    symbols: Mapping[str, torch.SymInt]
    dimensions: tuple[Dimension, ...]
    tensors: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)
    inputs: dict[str, fx.Node] = field(default_factory=dict)

    def size(self, size: Size | None) -> int | torch.SymInt:
        """A size in the symbols of this graph. Raises AssertionError for one that nobody knows the meaning of."""
        assert size is not None, "an input of a program has sizes with names, or fixed ones"
        if isinstance(size, int):
            return size
        total: int | torch.SymInt = 0
        for name in size:
            total = (name if isinstance(name, int) else self.symbols[name]) + total
        return total

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor like this one, of the same kind."""
        with self.mode:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made

    def tensors_named(self, names: frozenset[str]) -> frozenset[fx.Node]:
        """The placeholders of the tensors of these names."""
        return frozenset(node for node, name in self.names.items() if name in names)

    def add_tensor(self, name: str, value: torch.Tensor) -> fx.Node:
        """A placeholder for one more tensor, in front of the inputs."""
        with self.graph.inserting_before(next(iter(self.inputs.values()))):
            return self._put_tensor(name, value)

    def add_input(self, spec: InputSpec, dtype: torch.dtype, device: torch.device) -> fx.Node:
        """A placeholder for one more input, behind the others."""
        last = list(self.graph.find_nodes(op="placeholder"))[-1]
        with self.graph.inserting_after(last):
            return self._put_input(spec, dtype, device)

    def add_dimension(self, dimension: Dimension) -> None:
        """A size that varies, for inputs that are added."""
        assert self.mode.shape_env is not None
        self.symbols = {**self.symbols, dimension.name: _symbol(self.mode.shape_env, dimension)}
        self.dimensions = (*self.dimensions, dimension)

    def move_to_inputs(self, nodes: Mapping[str, fx.Node]) -> None:
        """Make inputs, by these names, of placeholders of tensors; they stand behind the others."""
        for name, node in nodes.items():
            placeholders = list(self.graph.find_nodes(op="placeholder"))
            if placeholders[-1] is not node:
                placeholders[-1].append(node)
            del self.tensors[node], self.names[node]
            self.inputs[name] = node

    def keep_outputs(self, kept: Sequence[int]) -> None:
        """Return these of the outputs only, by their places."""
        (node,) = self.graph.find_nodes(op="output")
        node.args = (tuple(node.args[0][each] for each in kept),)

    def drop_inputs(self, role: Role) -> None:
        """Do without the inputs of a role, where nothing reads them."""
        for name, node in list(self.inputs.items()):
            if spec_of(node).role == role and not node.users:
                self.graph.erase_node(node)
                del self.inputs[name]

    def spelled(self, size: torch.SymInt) -> str:
        """A size in words: "past + sequence"."""
        text = self.in_words(str(size.node.expr))
        return " + ".join(sorted(text.split(" + "))) if " + " in text else text

    def in_words(self, text: str) -> str:
        """A text with the names of dimensions for their symbols."""
        names = {str(symbol.node.expr): name for name, symbol in self.symbols.items()}
        return re.sub(r"\w+", lambda found: names.get(found[0], found[0]), text)

    def _put_tensor(self, name: str, value: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(("p_" if isinstance(value, nn.Parameter) else "b_") + _identifier(name))
        node.meta["val"] = self.fake(value)
        self.tensors[node], self.names[node] = value, name
        return node

    def _put_input(self, spec: InputSpec, dtype: torch.dtype, device: torch.device) -> fx.Node:
        node = self.graph.placeholder(_identifier(spec.name))
        shape = tuple(self.size(size) for size in spec.axes)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=device)
        describe(node, spec)
        self.inputs[spec.name] = node
        return node


ValueOf = Callable[[str], tuple[str, torch.Tensor]]
"""The path of an attribute -> the name and the value of the tensor there."""


@dataclass(frozen=True)
class Lift:
    """f(x), which reads W  ->  f(W, x), under sizes that have names

    `inputs` are those of the graph's placeholders, in their order; attributes of one name become one placeholder. What
    it leaves is a graph of its own, with its tensors beside it.
    """

    inputs: tuple[InputSpec, ...]
    dimensions: tuple[Dimension, ...]
    value_of: ValueOf = field(repr=False, compare=False)
    name: ClassVar[str] = "lift"
    leaves: ClassVar[Stage] = Stage.LIFTED

    def run(self, graph: fx.Graph) -> Change:
        """A copy of the graph, lifted. Raises BoundError where an operator accepts only some of the sizes."""
        lifted = lift(graph, self.value_of, self.inputs, self.dimensions)
        return Change(made=len(lifted.tensors), subject=lifted)


def lift(
    graph: fx.Graph,
    value_of: ValueOf,
    inputs: Sequence[InputSpec],
    dimensions: Sequence[Dimension],
) -> Lifted:
    """A copy of a graph, lifted. `inputs` are those of its placeholders, in their order.

    `value_of` gives, for the path of an attribute, the name and value of the tensor there; attributes of one name
    become one placeholder. Raises BoundError where an operator accepts only some of the sizes.
    """
    environment = ShapeEnv(specialize_zero_one=True, duck_shape=False)
    lifted = Lifted(
        fx.Graph(),
        FakeTensorMode(shape_env=environment, static_shapes=False),
        {each.name: _symbol(environment, each) for each in dimensions},
        tuple(dimensions),
    )
    copied: dict[fx.Node, fx.Node] = {}
    made: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        name, value = value_of(str(node.target))
        if name not in made:
            made[name] = lifted._put_tensor(name, value)
        copied[node] = made[name]
    for node, spec in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        value = node.meta["val"]
        copied[node] = lifted._put_input(spec, value.dtype, value.device)
    known = _known_sizes(copied)
    for node in graph.nodes:
        if node not in copied:
            copied[node] = lifted.graph.node_copy(node, lambda each: copied[each])
            _say_rows(copied[node], node, lifted, known)
    propagate(lifted)
    return lifted


def _say_rows(node: fx.Node, traced: fx.Node, lifted: Lifted, known: Mapping[Any, tuple[fx.Node, int]]) -> None:
    """view(x, [-1, ..])  ->  view(x, [size(an input), ..])

    Where the trace knows the first size to be an input's, nobody has to find it by dividing: of sums that can fail.
    Other sizes may have grown since the trace, by virtual tokens.
    """
    if node.target not in _VIEWS:
        return
    sizes: Any = node.args[1]
    first, *rest = sizes
    size = traced.meta["val"].shape[0] if first == -1 else None
    if isinstance(size, torch.SymInt) and size.node.expr in known:
        with lifted.graph.inserting_before(node):
            said = lifted.graph.call_function(torch.ops.aten.sym_size.int, known[size.node.expr])
        node.args = (node.args[0], [said, *rest])


def _known_sizes(copied: Mapping[fx.Node, fx.Node]) -> dict[Any, tuple[fx.Node, int]]:
    """Where the sizes of a trace can be read: an input and its axis, by symbol."""
    found: dict[Any, tuple[fx.Node, int]] = {}
    for node, placeholder in copied.items():
        if node.op == "placeholder" and "val" in node.meta:
            for axis, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt):
                    found.setdefault(size.node.expr, (placeholder, axis))
    return found


def propagate(lifted: Lifted) -> None:
    """Give every node its value in the graph's own symbols. Raises BoundError."""
    environment = lifted.mode.shape_env
    assert environment is not None
    for node in lifted.graph.nodes:
        if node.op != "call_function":
            continue
        args, kwargs = operands(node)
        value = node.meta["val"] = infer(operator_of(node), args, kwargs, lifted.mode)
        node.meta.pop("unbacked_bindings", None)  # of the trace's own symbols
        bindings = compute_unbacked_bindings(environment, value)
        if bindings:
            node.meta["unbacked_bindings"] = bindings
    check_unbound(lifted)


def check_unbound(lifted: Lifted) -> None:
    """Raise BoundError if an operator asked something of the sizes that not all of them are."""
    environment = lifted.mode.shape_env
    assert environment is not None
    asked = [str(each.expr) for each in environment.guards]
    asked += [f"{symbol} = {value}" for symbol, value in environment.replacements.items()]
    if asked:
        raise BoundError([lifted.in_words(each) for each in asked])


def _symbol(environment: ShapeEnv, dimension: Dimension) -> torch.SymInt:
    source = ConstantSource(dimension.name)
    symbol = environment.create_symbol(dimension.sample, source, DimDynamic.DYNAMIC, None)
    # torch takes 0 and 1 for constants while it propagates; what the program accepts is said when it is made.
    # Sizes are told apart by more than one value each; that no more are allowed is for whoever checks inputs.
    high = int_oo if dimension.high is None else max(dimension.high, dimension.sample + 1)
    environment.var_to_range[symbol] = ValueRanges(2, high)
    made = environment.create_symintnode(symbol, hint=dimension.sample, source=source)
    assert isinstance(made, torch.SymInt)
    return made


def _identifier(name: str) -> str:
    return "".join(each if each.isalnum() else "_" for each in name)
