"""Keeps the traces and programs of one model, and finds the one that serves a call."""

from collections.abc import Mapping
from dataclasses import replace
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

    def lower(self, graph: fx.Graph) -> fx.Graph:
        """A copy of a specialised graph, for Python to run as it is."""
        ...

    def plan(self, spec: AdapterSpec) -> AdapterPlan:
        """What an adapter puts where on this model."""
        ...

    def for_model(self, model: nn.Module) -> "Backend":
        """The same compiler for a copy of the model."""
        ...


Key = tuple[Signature, bool]
Programs = dict[Key, Program]


class Engine:
    """Finds or makes the program for a call under the active structure."""

    def __init__(self, backend: Backend, model: nn.Module):
        self.backend = backend
        self.slots = Slots()
        self._model = model
        self._traces: dict[Signature, Traced] = {}
        self._structures: dict[Structure, Programs] = {}
        self._structure = Structure()
        self._slot_value: SlotValue | None = None
        self._current: Programs = self._structures.setdefault(self._structure, {})

    def activate(self, structure: Structure, slot_value: SlotValue) -> None:
        """Serve calls with adapters of this structure from now on. Makes no graph: calls do."""
        self._slot_value = slot_value
        if structure is not self._structure:
            self._structure = structure
            self._current = self._structures.setdefault(structure, {})

    def intern(self, structure: Structure) -> Structure:
        """The equal structure seen first, so that switching compares by identity."""
        for known in self._structures:
            if known == structure:
                return known
        self._structures[structure] = {}
        return structure

    def run(self, entry: str, arguments: Mapping[str, Any]) -> Any:
        """Call the model (or a submodule of it) with named arguments."""
        call = read_call(entry, self._model.training, getattr(self._model, "config", None), arguments)
        return self.program(call)(call)

    def program(self, call: Call) -> Program:
        """The program for a call, made now if this is the first of its signature and structure."""
        autocast = torch.is_autocast_enabled(_device_type(call))
        program = self._current.get((call.signature, autocast))
        if program is None:
            program = self._make(call, autocast)
        if program.fits(call):
            return program
        sizes = tuple(tuple(tensor.shape) for tensor in call.tensors)
        bound = replace(call, signature=replace(call.signature, sizes=sizes))
        return self._current.get((bound.signature, autocast)) or self._make(bound, autocast)

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
        self._structures.clear()
        self._structures[self._structure] = self._current = {}

    def copy_for(self, model: nn.Module) -> "Engine":
        """An engine for a copy of the model; traces are shared, programs are not."""
        engine = Engine(self.backend.for_model(model), model)
        engine._traces = dict(self._traces)
        return engine

    def _make(self, call: Call, autocast: bool) -> Program:
        traced = self.traced(call)
        graph = self._specialised(traced, call.signature.training, autocast)
        program = Program(traced, graph, self.backend.lower, self._model, self.slots)
        self._current[call.signature, autocast] = program
        return program

    def _specialised(self, traced: Traced, training: bool, autocast: bool) -> fx.Graph:
        slot_value = self._slot_value or _no_slots
        return self.backend.specialise(traced, self._structure, slot_value, training=training, autocast=autocast)


def _no_slots(position: int, site: str, role: str, near: fx.Node) -> torch.Tensor:
    raise AssertionError("no adapter is active")


def _device_type(call: Call) -> str:
    return call.tensors[0].device.type if call.tensors else "cpu"
