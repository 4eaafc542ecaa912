"""A layer's graph calls its cache where the layer's own code does."""

import pytest
import torch
from torch import fx

from peftc.compiler.trace.cache_calls import call_cache, measured
from peftc.compiler.trace.outside import UntraceableError
from peftc.passes.ir.cache_update import update_cache
from peftc.runtime.regions.region import Update

aten = torch.ops.aten


class Layer:
    """A graph of x and of what a cache gives, K and V; each node holds a tensor of two rows."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x, self.keys, self.values = (self._mark(self.graph.placeholder(name)) for name in ("x", "K", "V"))

    def _mark(self, node: fx.Node) -> fx.Node:
        node.meta["val"] = torch.zeros(2, 2)
        return node

    def call(self, operator: object, *args: object) -> fx.Node:
        return self._mark(self.graph.call_function(operator, args))  # type: ignore[arg-type]

    def called(self, *outputs: fx.Node, updates: int = 1) -> list[str]:
        """The names of the operators once the cache is called, for whose updates the last outputs are."""
        self.graph.output(outputs)
        call_cache(self.graph, [Update(each) for each in range(updates)], 1, len(outputs) - 2 * updates)
        return [node.target.__name__ for node in self.graph.nodes if node.op == "call_function"]


def test_the_order_is_that_of_the_layer() -> None:
    """A size of what the cache gives, which was read first, moves behind the call; nothing else moves before it."""
    layer = Layer()
    size = layer.call(aten.sym_size.int, layer.keys, 0)
    query = layer.call(aten.neg.default, layer.x)
    key = layer.call(aten.abs.default, layer.x)
    value = layer.call(aten.exp.default, layer.x)
    scaled = layer.call(aten.mul.Tensor, query, size)
    seen = layer.call(aten.mm.default, scaled, layer.values)
    before = ["neg.default", "abs.default", "exp.default", "update_cache", "getitem"]
    assert layer.called(seen, key, value) == [*before, "sym_size.int", "getitem", "mul.Tensor", "mm.default"]
    layer.graph.lint()
    (node,) = layer.graph.find_nodes(op="call_function", target=update_cache)
    assert node.args[1:3] == (key, value)


def test_a_second_update_may_be_of_what_the_first_gave() -> None:
    layer = Layer()
    more = [layer._mark(layer.graph.placeholder(name)) for name in ("K2", "V2")]
    key = layer.call(aten.abs.default, layer.x)
    twice = layer.call(aten.neg.default, layer.keys)
    seen = layer.call(aten.mm.default, *more)
    names = layer.called(seen, key, key, twice, layer.values, updates=2)
    assert names.index("neg.default") > names.index("update_cache")
    assert names.count("update_cache") == 2
    assert names[-1] == "mm.default"
    layer.graph.lint()


def test_what_a_cache_is_given_cannot_depend_on_what_it_gives() -> None:
    layer = Layer()
    key = layer.call(aten.neg.default, layer.keys)
    with pytest.raises(UntraceableError, match="depends on what the cache gives"):
        layer.called(layer.x, key, layer.x)


def test_measured_reads_sizes_off_the_inputs() -> None:
    """Of constant sizes there is nothing to read: they are told as they are."""
    layer = Layer()
    key = layer.call(aten.unsqueeze.default, layer.x, 0)
    key.meta["val"] = torch.zeros(1, 2, 2)
    layer.called(layer.values, key, key)
    (update,) = measured(layer.graph, [Update(0)])
    assert (update.tokens, update.sizes) == (2, ((2, 2), (2, 2)))
