"""From an adapted model and a call to a program that stands alone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from peftc.compiler.export_model import entries
from peftc.compiler.export_model.bank import Bank, Pieces, read_bank
from peftc.compiler.export_model.entries import EntryCall
from peftc.compiler.export_model.export_options import Adapters
from peftc.compiler.export_model.slots import SlotValues, in_slots, slots_of, state_name
from peftc.compiler.pipeline import managed
from peftc.compiler.pipeline.lower import compilable
from peftc.grammar.diagnostics import ModelError, fail
from peftc.passes.export.exported import ADAPTER, exported_program
from peftc.passes.export.fold import Fold, drop_unused
from peftc.passes.export.lift import BoundError, Dimension, Lift, Lifted
from peftc.passes.export.route import BANK, Route
from peftc.passes.export.start_empty import StartEmpty
from peftc.passes.foreign import transformers as contract
from peftc.passes.ir.inputs import InputSpec, spec_of
from peftc.passes.ir.roles import Role
from peftc.passes.ir.traced import Traced
from peftc.passes.route.route_rows import prepare
from peftc.passes.virtual_tokens.insert_prefix import CARRIED
from peftc.runtime.adapted.base_weights import Active
from peftc.runtime.execution.engine import Engine
from peftc.runtime.files.tensor_file import in_file
from peftc.runtime.model.model import AdaptedModel

IDS = "adapter_ids"
SLOTS, TURNED = "slots", "turned"  # what a manifest says of a bank's tensors


@dataclass(frozen=True)
class BuiltProgram:
    """A program, the call it is for, what it takes and gives: names with sizes and types, as a manifest has them.

    `slots` are the attribute paths of an adapter's tensors, by the names that programs have for them. `rows` are what a
    program has of each of the adapters that rows choose from, by its name.
    """

    entered: EntryCall
    program: ExportedProgram
    inputs: tuple[Mapping[str, Any], ...]
    outputs: tuple[Mapping[str, Any], ...]
    dimensions: tuple[Dimension, ...]
    state: Mapping[str, str]
    slots: Mapping[str, str]
    rows: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    @cached_property
    def bank(self) -> dict[str, torch.Tensor]:
        """What rows choose from."""
        names = next(iter(self.rows.values()), {})
        return {name: torch.stack([each[name] for each in self.rows.values()]) for name in names}

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Run it as it will be run: what is given by name, dictionaries of tensors flattened. It has its own bank."""
        signature = self.program.graph_signature
        flat: list[torch.Tensor] = []
        for each in self.inputs:
            value: Any = self.bank if each["name"] == BANK else inputs[each["name"]]
            flat += [value[inner["name"]] for inner in each["tensors"]] if "tensors" in each else [value]
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
    bank: Bank | None = None,
) -> BuiltProgram:
    """The program for a call, with the adapters that are active (merged, inputs) or all of these (routed).

    `beside` are the slots of the programs that it is to have the names of adapters' tensors in common with, `bank` is
    that of the routed adapters.

    Raises UsageError where the adapters are not alike, UnroutedError where rows cannot choose among them, and
    ModelError where the graph holds for some sizes only, or has operators that only peftc knows.
    """
    if adapters == "routed":
        bank = bank or read_bank(adapted, names)
    try:
        begun = _begin(adapted, entered, beside or {}, bank, max_batch_size=max_batch_size, max_length=max_length)
        kept, outputs, state = _returned(entered, begun)
        carried = any(spec_of(node).role == Role.CARRIED for node in begun.lifted.inputs.values())
        if adapters == "routed" and (carried or any(name.startswith(CARRIED) for name in outputs)):
            message = "rows cannot choose among prompts while text is generated: what they leave is one for all rows"
            fail(ModelError, "E647", message, help="export the plain forward, or the adapters as inputs")
        lifted = begun.lifted
        lifted.keep_outputs(kept)
        taken = _taken(begun, adapters, bank)
        drop_unused(lifted)
        lifted.drop_inputs(Role.ENCODED)
    except BoundError as error:
        message = f"the graph of {adapted.base_class.__name__} holds for some sizes only: {error.reasons[0]}"
        fail(ModelError, "E644", message, help="its forward takes another way for other sizes: it cannot be exported")
    inputs = tuple(_inputs(lifted, taken))
    program = exported_program(lifted, outputs, taken.name, taken.nodes)
    given = tuple(_outputs(lifted, outputs))
    return BuiltProgram(entered, program, inputs, given, lifted.dimensions, state, begun.slots, taken.rows)


def pieces_of(
    adapted: AdaptedModel, entered: EntryCall, beside: Mapping[str, str], bank: Bank
) -> tuple[Pieces, Mapping[str, str]]:
    """What a program for a call reads of the adapters of a bank, and the slots that it has.

    Raises UnroutedError, UsageError and ModelError as `make`.
    """
    begun = _begin(adapted, entered, beside, bank, max_batch_size=None, max_length=None)
    return bank.pieces(begun.lifted, begun.slots), begun.slots


@dataclass(frozen=True)
class _Begun:
    """A call's graph with adapters, lifted, and what it was made of."""

    traced: Traced
    graph: fx.Graph
    lifted: Lifted
    slots: Mapping[str, str]


def _begin(
    adapted: AdaptedModel,
    entered: EntryCall,
    beside: Mapping[str, str],
    bank: Bank | None,
    *,
    max_batch_size: int | None,
    max_length: int | None,
) -> _Begun:
    engine: Engine = adapted._adapter_state.engine
    traced = engine.traced(entered.call)
    if bank is None:
        graph = engine.graph(entered.call)
    else:
        with bank.served(engine):
            graph = engine.graph(entered.call)
        prepare(graph, bank.constants)
    graph = compilable(graph)
    slots = slots_of(graph, beside)
    if entered.starts:
        _start_empty(graph, entered, traced)
    given = entries.program_inputs(graph)
    rows = entries.rows_of(graph)
    ranges = entries.dimensions(given, rows, max_batch_size=max_batch_size, max_length=max_length)
    if not isinstance(adapted, PreTrainedModel):
        ranges = entries.narrowed(ranges, given, traced.guards)
    lifted = _lifted(graph, SlotValues(engine, traced, slots, None if bank is None else bank.sample), given, ranges)
    return _Begun(traced, graph, lifted, slots)


@dataclass(frozen=True)
class _Taken:
    """What a program takes of adapters, as one dictionary: its name, its nodes by theirs, what is told of these.

    `rows` are what a bank has for each of its adapters.
    """

    name: str = ADAPTER
    nodes: Mapping[str, fx.Node] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)


def _taken(begun: _Begun, adapters: Adapters, bank: Bank | None) -> _Taken:
    """Put the adapters where they are to be."""
    lifted, slots = begun.lifted, begun.slots
    if bank is not None:
        return _routed(begun, bank)
    if adapters == "inputs":
        nodes = {name: node for node, name in lifted.names.items()}
        own = _as_in_file({name: nodes[state_name(name)] for name in slots})
        lifted.move_to_inputs({f"{ADAPTER}.{name}": node for name, node in own.items()})
        return _Taken(ADAPTER, own, {name: {"slot": slots[name]} for name in own})
    if slots:
        managed.run(lifted, [Fold(frozenset(map(state_name, slots)))])
    return _Taken()


def _routed(begun: _Begun, bank: Bank) -> _Taken:
    lifted, pieces = begun.lifted, bank.pieces(begun.lifted, begun.slots)
    rows, sizes = pieces.rows()
    turned = pieces.turned(sizes)
    managed.run(lifted, [Route(pieces.names, pieces.constants, IDS, sizes, turned, bank.has_base)])
    rows = {row: {name: in_bank(value, name in turned) for name, value in own.items()} for row, own in rows.items()}
    nodes = {name: lifted.inputs[f"{BANK}.{name}"] for name in sizes}
    facts = {name: {SLOTS: sorted(pieces.owners[name]), TURNED: name in turned} for name in sizes}
    return _Taken(BANK, _as_in_file(nodes), facts, rows)


def in_bank(piece: torch.Tensor, turned: bool) -> torch.Tensor:
    """A piece as a bank has it."""
    return piece.transpose(0, 1).contiguous() if turned else piece


def _as_in_file(nodes: Mapping[str, fx.Node]) -> dict[str, fx.Node]:
    return dict(sorted(nodes.items(), key=lambda each: in_file(each[0], each[1].meta["val"].dtype)))


def _lifted(graph: fx.Graph, values: SlotValues, given: Sequence[InputSpec], ranges: tuple[Dimension, ...]) -> Lifted:
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


def alone(adapted: AdaptedModel, name: str | None) -> AbstractContextManager[None]:
    """One adapter active, with weight 1, or none; afterwards those that were."""
    return activated(adapted, () if name is None else ((name, 1.0),))


@contextmanager
def activated(adapted: AdaptedModel, active: Active) -> Iterator[None]:
    """These adapters active; afterwards those that were. Raises UsageError where they cannot be."""
    state = adapted._adapter_state
    before = state.active
    state.activate(active)
    try:
        yield
    finally:
        state.activate(before)


def _returned(entered: EntryCall, begun: _Begun) -> tuple[list[int], list[str], dict[str, str]]:
    """Which outputs of the graph the program gives, their names, and which of them a later call takes, and as what."""
    (node,), traced = begun.graph.find_nodes(op="output"), begun.traced
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


def _inputs(lifted: Lifted, taken: _Taken) -> Iterator[Mapping[str, Any]]:
    inside = set(taken.nodes.values())
    for name, node in lifted.inputs.items():
        if node not in inside:
            yield _described(lifted, name, node)
    if inside:
        tensors = [{**_described(lifted, name, node), **taken.facts[name]} for name, node in taken.nodes.items()]
        yield {"name": taken.name, "tensors": tensors}


def _outputs(lifted: Lifted, names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    (output,) = lifted.graph.find_nodes(op="output")
    for name, node in zip(names, output.args[0], strict=True):
        yield _described(lifted, name, node)


def _described(lifted: Lifted, name: str, node: fx.Node) -> Mapping[str, Any]:
    value = node.meta["val"]
    sizes = [each if isinstance(each, int) else lifted.spelled(each) for each in value.shape]
    return {"name": name, "shape": sizes, "dtype": str(value.dtype).removeprefix("torch.")}
