"""A graph bound to live modules, ready to be called."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from peftc.passes.ir.traced import Traced
from peftc.passes.optimize.hoist import PIECES
from peftc.passes.route.route_rows import LanePieces
from peftc.runtime.adapters.slots import Kept
from peftc.runtime.execution import caches, nest, virtual
from peftc.runtime.execution.call import Call
from peftc.runtime.execution.segments import Namespace, Recompute, layer_names, python_function, stitched

Constants = Mapping[str, torch.Tensor | nn.Module]


@dataclass(frozen=True)
class Lowered:
    """A graph in the forms that run: for torch.compile, for Python, and what computes the pieces the latter reads.

    `lanes` compute what both read where rows have adapters of their own; `grouped` are the names of what the second may
    be given as adapters have it, beside each other, and not by row (see `GroupRows`).
    """

    traceable: fx.Graph
    plain: fx.Graph
    prologue: fx.Graph | None = None
    lanes: tuple[LanePieces, ...] = ()
    grouped: frozenset[str] = frozenset()


class Program:
    """Runs one graph: a signature of calls, a structure of adapters.

    The graph reads weights straight from the model's own leaf modules and adapters from slots, so a replaced parameter
    (moved, merged, switched) is seen by the next call. It is held in two forms: a GraphModule for torch.compile to
    trace, and a plain function, lowered further, for Python to run. Both graphs are taken over. For training the second
    is kept, and when first asked for becomes a function of a third kind, which recomputes layers in the backward pass.
    """

    def __init__(self, traced: Traced, lowered: Lowered, find: "Finder", *, training: bool = False):
        self.traced = traced
        self.form: nest.Form = traced.outputs  # type: ignore[assignment]
        self.layout: caches.Layout | None = traced.cache  # type: ignore[assignment]
        self.returns_cache = nest.holds_cache(self.form)
        self.cached = traced.cached
        self.count = nest.count_tensors(self.form)
        self._guard = guard_of(traced.guards)

        def held(owner: str, leaf: str) -> tuple[dict[str, Any], str]:
            return held_by(find(owner), leaf), leaf

        self.pieces = None if lowered.prologue is None else hoisted(lowered.prologue, held)
        root = _bound(lowered.plain, traced.constants, held, self.pieces)
        self.function = _function(lowered.plain, root)
        self._recomputed: tuple[Recompute, Callable[..., Any]] | None = None
        self._cut = partial(_cut, lowered.plain, find(""), root) if training else None
        self.module = graph_module(lowered.traceable, traced.constants, find)

    def fits(self, call: Call) -> bool:
        """Whether the sizes the trace is bound to are those of the call."""
        for tensor, sizes in zip(call.tensors, self.traced.shapes, strict=False):
            for axis, size in enumerate(sizes):
                if size is not None and tensor.shape[axis] != size:
                    return False
        return self._guard is None or self._guard([tensor.shape for tensor in call.tensors])

    def recomputing(self, recompute: Recompute) -> Callable[..., Any] | None:
        """The function that recomputes layers; None where this program is not for training."""
        if self._cut is None:
            return None
        if self._recomputed is None or self._recomputed[0] != recompute:
            self._recomputed = recompute, self._cut(recompute)
        return self._recomputed[1]

    def __call__(self, call: Call, recompute: Recompute | None = None) -> Any:
        """Run the call, and put the output together as the model would have.

        With `recompute`, and where gradients are kept, layers are recomputed. torch.compile, which decides itself what
        to keep and what to recompute, is given the whole graph all the same.
        """
        tensors = call.tensors
        if call.cache is not None:
            assert self.layout is not None
            tensors = tensors + caches.read(call.cache, self.layout, call.rows, tensors[0].device)
        tensors = [*tensors, *call.extra]
        if torch.compiler.is_compiling():
            leaves = list(self.module.forward(*tensors))
        else:
            if self.pieces is not None:
                self.pieces.refresh()
            function = self.function
            if recompute is not None and torch.is_grad_enabled():
                function = self.recomputing(recompute) or function
            leaves = list(function(*tensors))
        cache = call.cache
        if self.returns_cache:
            assert self.layout is not None
            stop = self.count + self.cached
            kept, carried, leaves = leaves[self.count : stop], leaves[stop:], leaves[: self.count]
            if cache is None:
                cache = caches.build(self.layout, kept)
            else:
                caches.store(cache, self.layout, kept)
            if carried:
                virtual.carry(cache, call.owner, carried)
        return nest.rebuild(self.form, leaves, cache if call.keeps_cache else None)


class HoistedConstants:
    """What a graph reads that weights and parameters alone decide; computed anew when one of them changed."""

    def __init__(self, sources: "Sequence[Kept]", compute: Callable[[], tuple[torch.Tensor, ...]]):
        self._sources, self._compute = sources, compute
        self._seen: list[torch.Tensor] = []
        self._versions: list[int] = []
        self.values: dict[str, torch.Tensor] = {}

    def refresh(self) -> None:
        """Compute the pieces unless every tensor is the one it was, unwritten since."""
        now = [held[leaf] for held, leaf in self._sources]
        if torch.is_grad_enabled() and any(each.requires_grad for each in now):
            self._seen = []
            self._put(self._compute())
            return
        try:
            versions = [each._version for each in now]
        except RuntimeError:  # a tensor made in inference mode does not tell whether it was written to
            versions = []
        if versions and versions == self._versions and all(map(operator.is_, now, self._seen)):
            return
        with torch.no_grad():
            self._put(self._compute())
        self._seen, self._versions = (now, versions) if versions else ([], [])

    def _put(self, values: tuple[torch.Tensor, ...]) -> None:
        self.values.update({f"p{index}": value for index, value in enumerate(values)})


def hoisted(prologue: fx.Graph, held: "Held") -> HoistedConstants:
    """What keeps the results of a prologue, which is taken over."""
    targets = [str(node.target) for node in prologue.find_nodes(op="get_attr")]
    sources = [held(owner, leaf) for owner, _, leaf in (each.rpartition(".") for each in targets)]
    return HoistedConstants(sources, _function(prologue, _bound(prologue, {}, held, None)))


Guard = Callable[[Sequence[Sequence[int]]], bool]


def guard_of(guards: tuple[str, ...]) -> Guard | None:
    """One function of the inputs' sizes for all guards of a trace; None where there are none."""
    if not guards:
        return None
    return eval(f"lambda sizes: {' and '.join(f'({each})' for each in guards)}", {"math": math, "torch": torch})


Finder = Callable[[str], nn.Module]
"""The path of a module in graphs -> the live module; the empty path is the model."""

Held = Callable[[str, str], Kept]
"""The path of a module in graphs, and a name -> the dictionary in which what is read is kept, and its name there."""


def graph_module(graph: fx.Graph, constants: Constants, find: Finder) -> fx.GraphModule:
    """Takes the graph over: a GraphModule whose direct children are the live leaf modules it reads."""
    root = nn.Module()
    owners: dict[str, str] = {}
    live: dict[str, nn.Module] = {}
    for node in graph.find_nodes(op="get_attr"):
        target = str(node.target)
        if target in constants:
            node.target = constant_name(target)
            value = constants[target]
            if isinstance(value, nn.Module):
                root.add_module(node.target, value)
            else:
                root.register_buffer(node.target, value, persistent=False)
            continue
        owner, _, leaf = target.rpartition(".")
        short = owners.setdefault(owner, f"m{len(owners)}")
        root._modules[short] = live[short] = find(owner)
        node.target = f"{short}.{leaf}"
    module = fx.GraphModule(root, graph, class_name="AdaptedGraph")
    # GraphModule made containers of its own with the tensors of this moment; the live modules take their place.
    module._modules.update(live)
    module.training = False
    return module


def _bound(graph: fx.Graph, constants: Constants, held_at: Held, pieces: HoistedConstants | None) -> Namespace:
    """Takes the graph over: what its attributes are to be read from.

    `nn.Module` looks an attribute up in microseconds, which hundreds of weights a token add up. Here a name stands for
    the very dictionary the module keeps its parameters in: as live, and a plain look-up.
    """
    root = Namespace()
    names: dict[object, str] = {}
    for node in graph.find_nodes(op="get_attr"):
        target = str(node.target)
        if target in constants:
            node.target = constant_name(target)
            setattr(root, node.target, constants[target])
            continue
        owner, _, leaf = target.rpartition(".")
        if owner == PIECES:
            assert pieces is not None
            held, name = pieces.values, leaf
        else:
            held, name = held_at(owner, leaf)
        key = id(held) if name == leaf else (id(held), name)
        short = names.setdefault(key, f"n{len(names)}")
        if not hasattr(root, short):
            setattr(root, short, namespace_of(held, leaf, name))
        node.target = f"{short}.{leaf}"
    return root


def namespace_of(held: dict[str, Any], leaf: str, name: str) -> Any:
    """What has the values of a dictionary as attributes, or one that is kept under another name."""
    if name != leaf:
        return Alias(held, name)
    namespace = Namespace()
    namespace.__dict__ = held
    return namespace


class Alias:
    """One value of a dictionary, as whatever attribute it is asked for."""

    def __init__(self, held: dict[str, Any], name: str):
        self._held, self._name = held, name

    def __getattr__(self, _: str) -> Any:
        return self._held[self._name]


def _function(graph: fx.Graph, root: Namespace) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A function of the graph's inputs."""
    forward = python_function(graph)

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return forward(root, *tensors)

    return run


def _cut(graph: fx.Graph, model: nn.Module, root: Namespace, recompute: Recompute) -> Callable[..., Any]:
    return stitched(graph, layer_names(model), root, recompute)


def held_by(module: nn.Module, leaf: str) -> dict[str, Any]:
    """The dictionary in which a module keeps a tensor or number of this name."""
    for held in (module._parameters, module._buffers):
        if leaf in held:
            return held
    return module.__dict__


def constant_name(target: str) -> str:
    """What code reads a constant of a graph by."""
    return f"constant_{target.replace('.', '_')}"
