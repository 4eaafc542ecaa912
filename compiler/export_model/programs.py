"""From an adapted model and a call to a program that stands alone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from peftc.compiler.export_model import entries
from peftc.compiler.export_model.entries import EntryCall
from peftc.compiler.export_model.export_options import Adapters
from peftc.compiler.pipeline import managed
from peftc.compiler.pipeline.lower import compilable
from peftc.grammar.diagnostics import ModelError, fail
from peftc.passes.export.exported import ADAPTER, exported_program
from peftc.passes.export.fold import Fold, drop_unused
from peftc.passes.export.lift import BoundError, Dimension, Lift, Lifted
from peftc.passes.export.route import Route
from peftc.passes.export.start_empty import StartEmpty
from peftc.passes.foreign import transformers as contract
from peftc.passes.ir.emit import Origin
from peftc.passes.ir.inputs import InputSpec
from peftc.passes.ir.roles import Role
from peftc.passes.ir.traced import Traced
from peftc.passes.virtual_tokens.insert_prefix import CARRIED
from peftc.runtime.execution.engine import ADAPTERS, Engine
from peftc.runtime.files.tensor_file import in_file
from peftc.runtime.model.model import AdaptedModel

IDS = "adapter_ids"


@dataclass(frozen=True)
class BuiltProgram:
    """A program, the call it is for, what it takes and gives: names with sizes and types, as a manifest has them.

    `slots` are the attribute paths of an adapter's tensors, by the names that programs have for them.
    """

    entered: EntryCall
    program: ExportedProgram
    inputs: tuple[Mapping[str, Any], ...]
    outputs: tuple[Mapping[str, Any], ...]
    dimensions: tuple[Dimension, ...]
    state: Mapping[str, str]
    slots: Mapping[str, str]

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Run it as it will be run: what is given by name, dictionaries of tensors flattened."""
        signature = self.program.graph_signature
        flat: list[torch.Tensor] = []
        for each in self.inputs:
            value = inputs[each["name"]]
            flat += value.values() if isinstance(value, Mapping) else [value]
        held = [self.program.state_dict[each.target] for each in signature.input_specs if each.target is not None]
        with torch.no_grad():
            results = fx.GraphModule(nn.Module(), self.program.graph).forward(*held, *flat)
        return dict(zip((each["name"] for each in self.outputs), results, strict=True))


def make(
    adapted: AdaptedModel,
    entered: EntryCall,
    adapters: Adapters,
    names: Sequence[str],
    *,
    max_batch_size: int | None,
    max_length: int | None,
    beside: Mapping[str, str] | None = None,
) -> BuiltProgram:
    """The program for a call, with the adapters that are active (merged, inputs) or all of these (routed).

    `beside` are the slots of the programs that it is to have the names of adapters' tensors in common with.

    Raises ModelError where the graph holds for some sizes only, or has operators that only peftc knows.
    """
    engine: Engine = adapted._adapter_state.engine
    traced = engine.traced(entered.call)
    graph = compilable(engine.graph(entered.call))
    slots = _slots_of(graph, beside or {})
    if entered.starts:
        _start_empty(graph, entered, traced)
    is_known = isinstance(adapted, PreTrainedModel)
    given = entries.program_inputs(graph)
    rows = entries.rows_of(graph)
    ranges = entries.dimensions(given, rows, max_batch_size=max_batch_size, max_length=max_length)
    ranges = ranges if is_known else entries.narrowed(ranges, given, traced.guards)
    kept, outputs, state = _returned(entered, traced, graph)
    carries = any(name.startswith(CARRIED) for name in outputs) or any(spec.role == Role.CARRIED for spec in given)
    if adapters == "routed" and carries:
        message = "rows cannot choose among prompts while text is generated: what they leave behind is one for all rows"
        fail(ModelError, "E647", message, help="export the plain forward, or the adapters as inputs")
    try:
        lifted = _lifted(graph, _Values(engine, traced, slots), given, ranges)
        lifted.keep_outputs(kept)
        nodes = {name: node for node, name in lifted.names.items()}
        own = {name: nodes[_state_name(name)] for name in slots}
        taken: Mapping[str, fx.Node] = {}
        if adapters == "inputs":
            taken = dict(sorted(own.items(), key=lambda each: in_file(each[0], lifted.tensors[each[1]].dtype)))
            lifted.move_to_inputs({f"{ADAPTER}.{name}": node for name, node in taken.items()})
        elif adapters == "routed":
            bank = tuple(_bank(adapted, names, slots))
            managed.run(lifted, [Route(frozenset(map(_state_name, slots)), IDS, bank)])
        elif own:
            managed.run(lifted, [Fold(frozenset(map(_state_name, slots)))])
        drop_unused(lifted)
        lifted.drop_inputs(Role.ENCODED)
    except BoundError as error:
        message = f"the graph of {adapted.base_class.__name__} holds for some sizes only: {error.reasons[0]}"
        fail(ModelError, "E644", message, help="its forward takes another way for other sizes: it cannot be exported")
    inputs = tuple(_inputs(lifted, taken, slots))
    program = exported_program(lifted, outputs, taken)
    return BuiltProgram(entered, program, inputs, tuple(_outputs(lifted, outputs)), lifted.dimensions, state, slots)


def _lifted(graph: fx.Graph, values: "_Values", given: Sequence[InputSpec], ranges: tuple[Dimension, ...]) -> Lifted:
    """The graph lifted, its dimensions no larger than it holds for: a table of positions ends somewhere."""
    try:
        lifted = managed.run(graph, [Lift(tuple(given), ranges, values)]).subject
        assert isinstance(lifted, Lifted)
        return lifted
    except BoundError as error:
        limits = error.limits
        if limits is None or any(each.high == limits.get(each.name) for each in ranges if each.name in limits):
            raise
    return _lifted(graph, values, given, tuple(replace(each, high=limits.get(each.name, each.high)) for each in ranges))


def _start_empty(graph: fx.Graph, entered: EntryCall, traced: Traced) -> None:
    """A prefix stands in front of a cache; a plain forward has one, and it is empty."""
    pasts = tuple(spec.name for spec in traced.inputs if spec.role == Role.CACHE)
    if pasts:
        managed.run(graph, [StartEmpty(pasts, traced.inputs[0].name)])


def own_tensors(adapted: AdaptedModel, made: BuiltProgram, name: str) -> dict[str, torch.Tensor]:
    """What a program with adapters as inputs takes of one of them, in its order."""
    return in_slots(adapted, made.slots, name)


def in_slots(adapted: AdaptedModel, slots: Mapping[str, str], adapter: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors that belong in these slots, by name and in the order of files.

    What it has not is left out.
    """
    state = adapted._adapter_state
    own = state.engine.slots.tensors(state.adapter(adapter))
    found = {name: own[target].detach() for name, target in slots.items() if target in own}
    return {name: found[name] for name in sorted(found, key=lambda name: in_file(name, found[name].dtype))}


@contextmanager
def alone(adapted: AdaptedModel, name: str) -> Iterator[None]:
    """One adapter active, with weight 1; afterwards those that were."""
    state = adapted._adapter_state
    before = state.active
    state.activate(((name, 1.0),))
    try:
        yield
    finally:
        state.activate(before)


def _bank(
    adapted: AdaptedModel, names: Sequence[str], slots: Mapping[str, str]
) -> Iterator[Mapping[str, torch.Tensor]]:
    for name in names:
        found = in_slots(adapted, slots, name)
        yield {_state_name(slot): found[slot] for slot in slots}


class _Values:
    """Finds the tensor an attribute of a graph reads, and a name for it. Tied weights have one."""

    def __init__(self, engine: Engine, traced: Traced, slots: Mapping[str, str]):
        self._engine, self._traced = engine, traced
        self._slots = {target: _state_name(name) for name, target in slots.items()}
        self._names: dict[int, str] = {}

    def __call__(self, target: str) -> tuple[str, torch.Tensor]:
        if target in self._traced.constants:
            value = self._traced.constants[target]
            if isinstance(value, nn.Module):
                help = "it has a higher-order operator (a condition or a loop), which no program takes along"
                fail(ModelError, "E645", f"the graph reads {target}, which is not a tensor", help=help)
            return f"constant.{target}", value
        if target in self._slots:
            return self._slots[target], _read(self._engine, target)
        value = _read(self._engine, target)
        return self._names.setdefault(id(value), target), value


def _read(engine: Engine, target: str) -> torch.Tensor:
    owner, _, leaf = target.rpartition(".")
    value = getattr(engine.find(owner), leaf)
    assert isinstance(value, torch.Tensor)
    return value


def _is_slot(node: fx.Node) -> bool:
    return str(node.target).startswith(ADAPTERS)


def _slots_of(graph: fx.Graph, known: Mapping[str, str]) -> dict[str, str]:
    """What the graph reads of the active adapters, by names; what tied weights share has the name of the first.

    `known` are the slots of the programs beside it, which name them for all: a decode has no encoder.
    """
    names = {target: name for name, target in known.items()}
    read = dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr") if _is_slot(node))
    for node in graph.find_nodes(op="get_attr"):
        if _is_slot(node):
            names.setdefault(str(node.target), _slot_name(node))
    return {names[target]: target for target in read}


def _slot_name(node: fx.Node) -> str:
    """`model.layers.0.self_attn.q_proj.A`; with a number in front for adapters that are active beside the first."""
    origin: Origin = node.meta["peftc"]
    role = origin.role or str(node.target).rpartition(".")[2]
    name = f"{origin.site}.{role}".lstrip(".")
    return f"{origin.position}.{name}" if origin.position else name


def _state_name(name: str) -> str:
    return f"{ADAPTER}.{name}"


def _returned(entered: EntryCall, traced: Traced, graph: fx.Graph) -> tuple[list[int], list[str], dict[str, str]]:
    """Which outputs of the graph the program gives, their names, and which of them a later call takes, and as what."""
    (node,) = graph.find_nodes(op="output")
    count = len(node.args[0])
    layout: Any = traced.cache
    form: Any = traced.outputs
    plain = len(entries.output_names(form, None, 0, 0))
    carried = count - plain - traced.cached
    names = entries.output_names(form, layout, traced.cached, carried)
    generates = entered.names != (entries.FORWARD,)
    kept = [index for index, name in enumerate(names) if not generates or index >= plain or name == contract.LOGITS]
    state = {name: name.replace("present_", "past_", 1) for name in names[plain:]}
    return kept, [names[index] for index in kept], state if generates else {}


def _inputs(lifted: Lifted, adapter: Mapping[str, fx.Node], slots: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    for name, node in lifted.inputs.items():
        if node not in set(adapter.values()):
            yield _described(lifted, name, node)
    if adapter:
        tensors = [{**_described(lifted, name, node), "slot": slots[name]} for name, node in adapter.items()]
        yield {"name": ADAPTER, "tensors": tensors}


def _outputs(lifted: Lifted, names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    (output,) = lifted.graph.find_nodes(op="output")
    for name, node in zip(names, output.args[0], strict=True):
        yield _described(lifted, name, node)


def _described(lifted: Lifted, name: str, node: fx.Node) -> Mapping[str, Any]:
    value = node.meta["val"]
    sizes = [each if isinstance(each, int) else lifted.spelled(each) for each in value.shape]
    return {"name": name, "shape": sizes, "dtype": str(value.dtype).removeprefix("torch.")}
