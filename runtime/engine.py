"""Keeps the traces and programs of one model, and finds the one that serves a call."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import fx, nn

from peftc.grammar.spec import AdapterSpec
from peftc.passes.insert_delta import SlotValue
from peftc.passes.plan import AdapterPlan
from peftc.passes.structure import Structure
from peftc.passes.traced import Traced
from peftc.runtime.call import Call, Signature, read_call
from peftc.runtime.program import Program
from peftc.runtime.slots import Slots


class Backend(Protocol):
    """What the runtime needs from a compiler: traces, graphs and plans for one model."""

    def trace(self, call: Call) -> Traced:
        """The base graph for calls of this signature."""
        ...

    def specialise(
        self, traced: Traced, structure: Structure, slot_value: SlotValue, *, training: bool, autocast: bool
    ) -> fx.Graph:
        """The base graph with adapters of this structure in it; the trace is left as it is."""
        ...

    def lower(self, graph: fx.Graph, *, autocast: bool) -> tuple[fx.Graph, fx.Graph]:
        """Copies of a specialised graph: for torch.compile to trace, and for Python to run as it is."""
        ...

    def plan(self, spec: AdapterSpec) -> AdapterPlan:
        """What an adapter puts where on this model."""
        ...

    def for_model(self, model: nn.Module) -> "Backend":
        """The same compiler for a copy of the model."""
        ...


@dataclass(frozen=True, eq=False)
class Specialisation:
    """The programs made for one structure, by signature and whether autocast is on."""

    structure: Structure
    programs: dict[tuple[Signature, bool], Program] = field(default_factory=dict)


class Engine:
    """Finds or makes the program for a call under the active structure."""

    def __init__(self, backend: Backend, model: nn.Module):
        self.backend = backend
        self.slots = Slots()
        self._model = model
        self._traces: dict[Signature, Traced] = {}
        self._specialisations: dict[Structure, Specialisation] = {}
        self._slot_value: SlotValue = _no_slots
        self.plain = self._current = self.specialisation(Structure())

    def specialisation(self, structure: Structure) -> Specialisation:
        """The programs of this structure, the same object for equal structures."""
        return self._specialisations.setdefault(structure, Specialisation(structure))

    def activate(self, specialisation: Specialisation, slot_value: SlotValue) -> None:
        """Serve calls with adapters of this structure from now on. Makes no graph: calls do."""
        self._current, self._slot_value = specialisation, slot_value

    def run(self, entry: str, arguments: Mapping[str, Any]) -> Any:
        """Call the model (or a submodule of it) with named arguments."""
        call = self.call(entry, arguments)
        return self.program(call)(call)

    def call(self, entry: str, arguments: Mapping[str, Any]) -> Call:
        """A call of the model as it stands (training or not, with its config), taken apart. Raises UsageError."""
        return read_call(entry, self._model.training, getattr(self._model, "config", None), arguments)

    def program(self, call: Call) -> Program:
        """The program for a call, made now if this is the first of its signature and structure."""
        autocast = torch.is_autocast_enabled(_device_type(call))
        program = self._current.programs.get((call.signature, autocast))
        if program is None:
            program = self._make(call, autocast)
        if program.fits(call):
            return program
        sizes = tuple(tuple(tensor.shape) for tensor in call.tensors)
        bound = replace(call, signature=replace(call.signature, sizes=sizes))
        return self._current.programs.get((bound.signature, autocast)) or self._make(bound, autocast)

    def traced(self, call: Call) -> Traced:
        """The base graph for a call, traced now if it was not before."""
        if call.signature not in self._traces:
            self._traces[call.signature] = self.backend.trace(call)
        return self._traces[call.signature]

    def graph(self, call: Call) -> fx.Graph:
        """The graph that serves a call: what diagrams show."""
        return self._specialised(self.traced(call), call.signature.training, autocast=False)

    def reset(self) -> None:
        """Forget every trace and program: the model was moved, or its weights have other shapes."""
        self._traces.clear()
        for each in self._specialisations.values():
            each.programs.clear()

    def copy_for(self, model: nn.Module) -> "Engine":
        """An engine for a copy of the model; traces are shared, programs are not."""
        engine = Engine(self.backend.for_model(model), model)
        engine._traces = dict(self._traces)
        return engine

    def _make(self, call: Call, autocast: bool) -> Program:
        traced = self.traced(call)
        graph = self._specialised(traced, call.signature.training, autocast)
        traceable, plain = self.backend.lower(graph, autocast=autocast)
        program = Program(traced, traceable, plain, self._model, self.slots)
        self._current.programs[call.signature, autocast] = program
        return program

    def _specialised(self, traced: Traced, training: bool, autocast: bool) -> fx.Graph:
        structure = self._current.structure
        return self.backend.specialise(traced, structure, self._slot_value, training=training, autocast=autocast)


def _no_slots(position: int, site: str, role: str, near: fx.Node) -> torch.Tensor:
    raise AssertionError("no adapter is active")


def _device_type(call: Call) -> str:
    return call.tensors[0].device.type if call.tensors else "cpu"
