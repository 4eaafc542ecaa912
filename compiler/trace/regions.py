"""Traces one module by itself, from the arguments of one of its calls, to the graph of a region."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from transformers.cache_utils import Cache
from transformers.exporters.utils import patch_attributes

from peftc.compiler.pipeline import managed
from peftc.compiler.pipeline.lower import copy_graph
from peftc.compiler.trace.cache_calls import call_cache, measured
from peftc.compiler.trace.exporting import COMPILING, Input, apart, constants_of, exported, flat_graph, refuse
from peftc.compiler.trace.outside import UntraceableError
from peftc.compiler.trace.recording import Index, Recorder, config_copies, recorded, recording
from peftc.compiler.trace.twin import Twin
from peftc.grammar.diagnostics import AdapterError
from peftc.passes.ir.inputs import InputSpec, inputs_of
from peftc.passes.ir.split_tied_weights import SplitOwners
from peftc.passes.ir.traced import Traced
from peftc.passes.plan.sites import tied_names
from peftc.runtime.execution import cache_layers, nest
from peftc.runtime.regions.region import RegionCall, RegionTrace, Update
from peftc.runtime.regions.within import HEAD


def trace_region(module: nn.Module, call: RegionCall) -> RegionTrace:
    """The graph for calls of a module like this one. Raises ModelError for what has none."""
    try:
        return _trace(module, call)
    except AdapterError:
        raise
    except Exception as error:  # whatever the model's own code meets where nothing has values
        refuse(type(module).__name__, error)


def _trace(module: nn.Module, call: RegionCall) -> RegionTrace:
    recorder = Recorder()
    holder = nn.Module()
    holder._modules[HEAD] = module
    twin = Twin(holder, config_copies(module, recorder))
    region = twin.model.get_submodule(HEAD)
    _bare(region)
    recorded(region, recorder)
    if call.numbered:
        _with_numbers(region)
    given: list[torch.Tensor] = []
    forms = [nest.flatten(value, given, "an argument") for value in call.args]
    named = {name: nest.flatten(value, given, name) for name, value in call.kwargs.items()}
    leaves = list({id(each): each for each in given}.values())
    places = {id(each): at for at, each in enumerate(leaves)}
    run = _Run(region, forms, named, tuple(places[id(each)] for each in given), recorder)
    updates: list[_Pair] = []
    if call.cache is not None:
        fakes = [twin.fake(_like(each, each.shape)) for each in leaves]
        probe = _Probe(call.cache, twin)
        with _apart_from(leaves), twin.mode, torch.no_grad(), patch_attributes(COMPILING):
            run(fakes, probe)
        updates = probe.pairs
    inputs = [_input(f"in_{i}", each, twin, call) for i, each in enumerate(leaves)]
    for i, pair in enumerate(updates):
        for part, value in (("key", pair.keys), ("value", pair.values)):
            inputs.append(_cached(f"cached_{i}_{part}", value, twin, call))
    forward = _Forward(run, len(leaves), call)
    with _apart_from(leaves):
        graph_module, guards = exported(twin.model, forward, inputs, type(module).__name__)
    if recorder.turned and torch.is_grad_enabled():
        raise UntraceableError(f"its forward turns gradients on or off ({recorder.turned})")
    aliases = tied_names(twin.model)
    graph = copy_graph(flat_graph(graph_module, inputs))
    _refuse_autocast(graph, aliases)
    if updates:
        call_cache(graph, forward.updates, forward.count, forward.outputs)
    managed.run(graph, [SplitOwners(aliases)])
    recorder.gradients |= bool(recorder.turned)
    traced = Traced(
        graph=graph,
        inputs=tuple(inputs_of(graph).values()),
        constants=constants_of(graph_module, graph, aliases | _numbers(graph)),
        outputs=forward.form,
        cache=None,
        guards=tuple(guards),
    )
    return RegionTrace(traced, recorder.facts(), measured(graph, forward.updates), recorder.indexed)


@dataclass
class _Pair:
    """What a cache gives for one update, on fake values."""

    keys: torch.Tensor
    values: torch.Tensor


class _StandIn(Cache):  # type: ignore[misc]
    """In the place of a cache while a module is traced; whatever is asked of it but to be updated is refused."""

    def __init__(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        raise UntraceableError(f"it asks its cache for {name}")

    def __len__(self) -> int:
        raise UntraceableError("it asks its cache for its length")

    def __bool__(self) -> bool:
        return True

    def update(self, key_states: Any, value_states: Any, layer_idx: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(key_states, torch.Tensor) or not isinstance(value_states, torch.Tensor):
            raise UntraceableError("it gives its cache something other than keys and values")
        if not isinstance(layer_idx, Index | int):
            raise UntraceableError("it tells its cache more than keys and values")
        return self.updated(key_states, value_states, layer_idx)

    def updated(self, keys: torch.Tensor, values: torch.Tensor, index: Any) -> Any:
        raise NotImplementedError


for _name in ("get_seq_length", "get_mask_sizes", "get_max_length", "get_max_cache_shape", "crop", "reset"):
    if hasattr(Cache, _name):

        def _refused(self: Any, *_: Any, _asked: str = _name, **__: Any) -> Any:
            raise UntraceableError(f"it asks its cache for {_asked}")

        setattr(_StandIn, _name, _refused)


class _Probe(_StandIn):
    """Finds out what updates there are, and of what sizes what the cache gives is."""

    def __init__(self, cache: Cache, twin: Twin):
        self.cache, self.twin, self.pairs = cache, twin, list[_Pair]()

    def updated(self, keys: torch.Tensor, values: torch.Tensor, index: Any) -> Any:
        number = index.value if isinstance(index, Index) else index
        if (
            type(self.cache).update is not Cache.update
            or not hasattr(self.cache, "layers")
            or not all(map(cache_layers.is_known, self.cache.layers))
        ):
            raise UntraceableError(f"its cache is a {type(self.cache).__name__} of layers that are not known")
        try:
            length, _ = self.cache.get_mask_sizes(int(keys.shape[2]), number)
        except Exception as error:
            raise UntraceableError(f"its cache does not tell how much it holds ({type(error).__name__})") from error
        pair = _Pair(*(each.new_empty(*each.shape[:2], int(length), each.shape[3]) for each in (keys, values)))
        self.pairs.append(pair)
        return pair.keys, pair.values


class _Given(_StandIn):
    """Gives inputs of the graph for what a cache would."""

    def __init__(self, values: Sequence[torch.Tensor]):
        self.values = list(values)
        self.updates: list[Update] = []
        self.given: list[torch.Tensor] = []

    def updated(self, keys: torch.Tensor, values: torch.Tensor, index: Any) -> Any:
        where = f"{index.path}.{index.name}".lstrip(".") if isinstance(index, Index) else index
        self.updates.append(Update(where))
        self.given += [keys, values]
        return self.values.pop(0), self.values.pop(0)


@dataclass
class _Run:
    """Calls the twin."""

    module: nn.Module
    forms: list[nest.Form]
    named: Mapping[str, nest.Form]
    places: tuple[int, ...]  # of every argument among the tensors: one may be given twice
    recorder: Recorder

    def __call__(self, tensors: Sequence[torch.Tensor], cache: Cache | None) -> Any:
        left = [tensors[at] for at in self.places]
        args = [nest.rebuild(form, left, cache) for form in self.forms]
        kwargs = {name: nest.rebuild(form, left, cache) for name, form in self.named.items()}
        with recording(self.recorder):
            return self.module(*args, **kwargs)


@dataclass
class _Forward:
    """A region's forward with flat tensors in and out, as the exporter sees it."""

    run: _Run
    count: int
    call: RegionCall
    form: nest.Form = ()
    updates: list[Update] = field(default_factory=list)
    outputs: int = 0

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        values = list(tensors.values())
        cache = None if self.call.cache is None else _Given(values[self.count :])
        output = self.run(values[: self.count], cache)
        leaves: list[torch.Tensor] = []
        self.form = nest.flatten(output, leaves, "the output")
        self.outputs = len(leaves)
        if cache is not None:
            self.updates = cache.updates
            leaves += cache.given
        return leaves


def _refuse_autocast(graph: fx.Graph, names: Mapping[str, tuple[str, ...]]) -> None:
    """Adapters of a module that is called in a block of autocast would not be in the block."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_autocast):
        for each in node.all_input_nodes:
            if each.op == "get_attr" and each.target in names:
                path = str(each.target).rpartition(".")[0].removeprefix(HEAD).lstrip(".")
                raise UntraceableError(f"it calls {path or 'its own weights'} inside of torch.autocast")


def _input(name: str, tensor: torch.Tensor, twin: Twin, call: RegionCall) -> Input:
    shape = tuple(int(size) for size in tensor.shape)
    axes = tuple(size if size <= 1 or call.exact else None for size in shape)
    return Input(InputSpec(name, axes=axes), twin.fake(_like(tensor, shape)))


def _cached(name: str, tensor: torch.Tensor, twin: Twin, call: RegionCall) -> Input:
    """What a cache gives: heads and their size are the model's own."""
    rows, heads, length, size = (int(each) for each in tensor.shape)
    free = [None if each > 1 and not call.exact else each for each in (rows, length)]
    spec = InputSpec(name, axes=(free[0], heads, free[1], size))
    return Input(spec, twin.fake(_like(tensor, tensor.shape)))


def _like(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return torch.zeros(tuple(shape), dtype=tensor.dtype, device=tensor.device)


def _bare(region: nn.Module) -> None:
    """Take off what runs around a region, and not in it."""
    vars(region).pop("forward", None)
    for value in (vars(region)[name] for name in vars(region) if name.endswith("_hooks") and name.startswith("_")):
        if isinstance(value, dict):
            value.clear()


def _with_numbers(region: nn.Module) -> None:
    """Let layers know their own numbers as they are: the trace is of this one alone."""
    for each in region.modules():
        for name, value in list(vars(each).items()):
            if isinstance(value, Index):
                vars(each)[name] = value.value


def _numbers(graph: fx.Graph) -> dict[str, tuple[str, ...]]:
    """What the graph reads that is a layer's own number."""
    return {str(node.target): () for node in graph.find_nodes(op="get_attr") if isinstance(node.meta.get("val"), int)}


def _apart_from(tensors: Sequence[torch.Tensor]) -> Any:
    return apart(tensors[0].device.type if tensors else "cpu")
