"""Keeps the traces and programs of one model, and finds the one that serves a call."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx, nn

from peftc.grammar.diagnostics import ModelError, fail
from peftc.passes.cost.cost import Choice, Lookup, Sizes, all_sizes, choose
from peftc.passes.foreign import transformers as contract
from peftc.passes.insert.insert_delta import SlotValue
from peftc.passes.ir.traced import Traced
from peftc.passes.plan import structure as structures
from peftc.passes.plan.structure import Structure
from peftc.runtime.adapters.slots import Binding, Slots, Sources, bind
from peftc.runtime.execution.backend import CompilerProtocol
from peftc.runtime.execution.call import Call, Signature, read_call
from peftc.runtime.execution.call_routing import positions_of, widened
from peftc.runtime.execution.outside import outside
from peftc.runtime.execution.program import Program
from peftc.runtime.execution.segments import Recompute
from peftc.runtime.execution.storage import Storage
from peftc.runtime.execution.virtual import Virtual, no_task
from peftc.runtime.mixed_batch.batch import MixedBatch
from peftc.runtime.mixed_batch.gates import Gates
from peftc.runtime.mixed_batch.row_pieces import RowPieces

ADAPTERS = ("slots.", "copies.")  # how the attribute paths of slots begin
STORED = f"{structures.STORED}."
COMPILED = Choice()  # how sites are lowered under torch.compile, whatever the size of the call


@dataclass(frozen=True, eq=False)
class Specialisation:
    """The programs made for one structure, by signature, whether autocast is on, and how sites are lowered."""

    structure: Structure
    programs: dict[tuple[Signature, bool, Choice], Program] = field(default_factory=dict)
    choices: dict[tuple[tuple[Sizes, ...], int, bool, bool], Choice] = field(default_factory=dict)
    regions: dict[str, Any] = field(default_factory=dict)  # what modules by themselves have of it, whoever is active

    def choice(self, lookup: Lookup, tokens: int, *, training: bool, frozen: bool) -> Choice:
        """The cheapest lowerings for adapters of these sizes, and a call of so many tokens."""
        sizes = all_sizes(self.structure, lookup)
        key = (sizes, tokens.bit_length(), training, frozen)
        if key not in self.choices:
            self.choices[key] = choose(self.structure, sizes, tokens, training=training, frozen=frozen)
        return self.choices[key]


@dataclass(frozen=True, eq=False)
class ActiveAdapters:
    """The adapters in the slots: what graphs are made for, and what choosing between lowerings depends on."""

    specialisation: Specialisation
    slot_value: SlotValue
    lookup: Lookup
    trainable: bool = False
    penalties: tuple[Callable[[], torch.Tensor | None], ...] = ()  # added to the loss in training
    choices: dict[tuple[int, bool], Choice] = field(default_factory=dict)
    virtual: Virtual = field(default_factory=Virtual)
    sources: Callable[[], Sources] = dict
    holders: Callable[[], Sequence[nn.Module]] = tuple  # the modules that hold the adapters' tensors
    regions: dict[str, Any] = field(default_factory=dict)  # what modules by themselves run with these adapters
    mixed: MixedBatch | None = None  # which of them each row has, where rows have adapters of their own
    compiled: list[RowPieces] = field(default_factory=list)  # what graphs that a compiler has read of these
    gates: Gates | None = None  # how much of them each token is given, where tokens differ

    @property
    def is_one_for_all(self) -> bool:
        """Whether rows and tokens all have the same of them."""
        return self.mixed is None and self.gates is None

    def as_now(self) -> Callable[[], AbstractContextManager[None]]:
        """What, later, lets rows and tokens have what they have now."""
        if self.mixed is not None:
            return partial(self.mixed.having, self.mixed.rows)
        return nullcontext if self.gates is None else partial(self.gates.having, self.gates.now)


class Engine:
    """Finds or makes the program for a call under the active structure."""

    def __init__(self, backend: CompilerProtocol, model: nn.Module):
        self.backend = backend
        self.slots = Slots()
        self.storage = Storage(model)
        self.when_reset: list[Callable[[], None]] = []  # to be told when what was made is forgotten
        self.recompute: Recompute | None = None  # how layers are recomputed in training, if they are
        self.model = model
        self.forward = contract.forward_of(model.forward)
        self._fixed: Choice | None = None
        self._bindings: Callable[[], Sequence[Binding]] | None = None
        self._takes_cache: dict[str, bool] = {}
        self._traces: dict[Signature, Traced] = {}
        self._asking: set[Signature] = set()  # of calls whose forward asks whether gradients are kept
        self._specialisations: dict[Structure, Specialisation] = {}
        self.plain = self._tenant = ActiveAdapters(self.specialisation(Structure()), _no_slots, _no_slots)

    @cached_property
    def positions(self) -> int | None:
        """How many tokens the model has learned positions for."""
        return positions_of(self.model)

    def specialisation(self, structure: Structure) -> Specialisation:
        """The programs of this structure, the same object for equal structures."""
        return self._specialisations.setdefault(structure, Specialisation(structure))

    def activate(self, tenant: ActiveAdapters, bindings: Callable[[], Sequence[Binding]] | None = None) -> None:
        """Serve calls with these adapters from now on. Makes no graph: calls do.

        `bindings` put their tensors into the slots, when a graph of the whole model is first asked for.
        """
        self._tenant, self._bindings = tenant, bindings

    def bind(self) -> None:
        """Put the active adapters' tensors into the slots."""
        if self._bindings is not None:
            bind(list(self._bindings()))
            self._bindings = None

    @property
    def active(self) -> ActiveAdapters:
        """What calls are served with now."""
        return self._tenant

    @property
    def structure(self) -> Structure:
        """What graphs are made for now."""
        return self._tenant.specialisation.structure

    def run(self, entry: str, arguments: Mapping[str, Any]) -> Any:
        """Call the model (or a submodule of it) with named arguments."""
        call, tenant = self.call(entry, arguments), self._tenant
        program = self.program(call)
        own = program.traced.own_backward
        if own and torch.is_grad_enabled():
            message = f"{own} has a backward of its own, which is lost in a graph of the whole model"
            help = 'call the model under torch.no_grad(), or choose regions="layers": there it runs as it is written'
            fail(ModelError, "E466", message, help=help)
        output = program(call, self.recompute)
        if call.signature.training:
            self.penalise(output, tenant)
        return output

    def penalise(self, output: Any, tenant: ActiveAdapters) -> None:
        """Add the regularisers of adapters that are trained to the loss, where the model gives one."""
        if tenant.trainable and tenant.penalties:
            _penalise(output, tenant)

    def call(self, entry: str, arguments: Mapping[str, Any]) -> Call:
        """A call of the model as it stands (training or not, with its config), taken apart. Raises UsageError.

        Where virtual tokens stand in front, it is the call that the graph for them takes.
        """
        return widened(self, self._tenant.virtual, entry, arguments)

    def plain_call(self, entry: str, arguments: Mapping[str, Any]) -> Call:
        """A call taken apart, without virtual tokens. Raises UsageError."""
        forward = None if entry else self.forward
        return read_call(entry, self.model.training, getattr(self.model, "config", None), arguments, forward)

    def takes_cache(self, call: Call) -> bool:
        """Whether the model can be given keys and values that attention sees beside the call's own."""
        entry = call.signature.entry
        if entry not in self._takes_cache:
            self._takes_cache[entry] = call.cache is not None or self.backend.takes_cache(call)
        return self._takes_cache[entry]

    def program(self, call: Call, choice: Choice | None = None) -> Program:
        """The program for a call, made now if this is the first of its signature and structure.

        Sites are lowered by `choice`, or as is cheapest for a call of this size.
        """
        self.bind()
        call = self._graded(call)
        autocast = torch.is_autocast_enabled(_device_type(call))
        choice = self._choice(call) if choice is None else choice
        programs = self._tenant.specialisation.programs
        program = programs.get((call.signature, autocast, choice))
        if program is None:
            program = self._make(call, autocast, choice)
        if program.fits(call):
            return program
        sizes = tuple(tuple(tensor.shape) for tensor in call.tensors)
        bound = replace(call, signature=replace(call.signature, sizes=sizes))
        return programs.get((bound.signature, autocast, choice)) or self._make(bound, autocast, choice)

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """Inside, no W' is computed, whatever the size of a call: that would be a merge."""
        before, self._fixed = self._fixed, COMPILED
        try:
            yield
        finally:
            self._fixed = before

    def traced(self, call: Call) -> Traced:
        """The base graph for a call, traced now if it was not before."""
        signature = replace(self._graded(call).signature, mode="")
        if signature not in self._traces:
            with outside():
                traced = self.backend.trace(replace(call, signature=signature))
            if traced.gradients is not None and signature.gradients is None:
                self._asking.add(replace(signature, sizes=()))
                signature = replace(signature, gradients=traced.gradients)
            self._traces[signature] = traced
        return self._traces[signature]

    def _graded(self, call: Call) -> Call:
        """The call, which says whether it keeps gradients where the model's forward asks."""
        plain = replace(call.signature, mode="", sizes=(), gradients=None)
        if plain not in self._asking:
            return call
        return replace(call, signature=replace(call.signature, gradients=torch.is_grad_enabled()))

    @property
    def trace_count(self) -> int:
        """How many graphs of the whole model there are so far, without adapters."""
        return len(self._traces)

    def graph(self, call: Call) -> fx.Graph:
        """The graph that serves a call: what diagrams show."""
        return self._specialised(self.traced(call), call.signature, False, COMPILED)

    def reset(self, *, traces: bool = True) -> None:
        """Forget every trace and program: the model was moved, or its weights have other shapes.

        Without `traces` only the programs: weights are stored in another way.
        """
        if traces:
            self._traces.clear()
            self._asking.clear()
        self.storage.refresh()
        for each in self._specialisations.values():
            each.programs.clear()
        for tell in self.when_reset:
            tell()

    def forget(self) -> None:
        """Forget the graphs of the whole model: something in it was changed."""
        self._traces, self._asking = {}, set()
        for each in self._specialisations.values():
            each.programs.clear()

    def __reduce__(self) -> Any:
        """Without what it made: another process makes its own."""
        return Engine, (self.backend, self.model), {"recompute": self.recompute}

    def copy_for(self, model: nn.Module) -> "Engine":
        """An engine for a copy of the model; it has the traces that there are, programs are not shared."""
        engine = Engine(self.backend.for_model(model), model)
        engine._traces, engine._asking = dict(self._traces), set(self._asking)
        engine.recompute = self.recompute
        return engine

    def beside(self, model: nn.Module, *, traces: bool) -> "Engine":
        """An engine for a model that is like this one while both live, so that a trace of one can be of both."""
        engine = self.copy_for(model)
        engine._traces, engine._asking = (self._traces, self._asking) if traces else ({}, set())
        return engine

    def find(self, owner: str) -> nn.Module:
        """The module that an attribute of a graph belongs to."""
        if owner.startswith(ADAPTERS):
            self.bind()
            return self.slots.module(owner)
        return self.storage.module(owner) if owner.startswith(STORED) else self.model.get_submodule(owner)

    def _choice(self, call: Call) -> Choice:
        """How sites are lowered for a call of this size: sizes between two powers of two share one choice."""
        return self.choice(_tokens(call), _device_type(call))

    def choice(self, tokens: int, device: str, tenant: ActiveAdapters | None = None) -> Choice:
        """How sites are lowered that see so many tokens on a type of device."""
        tenant = tenant or self._tenant
        # A compiler would specialise on the sizes that are compared here, and autocast would round a computed weight.
        fixed = torch.compiler.is_compiling() or torch.is_autocast_enabled(device)
        if self._fixed is not None:
            return self._fixed
        if fixed or not tenant.specialisation.structure.sites:
            return COMPILED
        training = tenant.trainable and torch.is_grad_enabled()
        key = (tokens.bit_length(), training)
        if key not in tenant.choices:
            frozen = not tenant.trainable
            made = tenant.specialisation.choice(tenant.lookup, tokens, training=training, frozen=frozen)
            tenant.choices[key] = made
        return tenant.choices[key]

    def _make(self, call: Call, autocast: bool, choice: Choice) -> Program:
        if self.structure.tasks:
            no_task(self.structure.tasks)  # what rows have of their own is no graph of the whole model's
        with outside():
            traced = self.traced(call)
            call = self._graded(call)
            graph = self._specialised(traced, call.signature, autocast, choice)
            lowered = self.backend.lower(graph, autocast=autocast, choice=choice)
            program = Program(traced, lowered, self.find, training=call.signature.training)
        self._tenant.specialisation.programs[call.signature, autocast, choice] = program
        return program

    def _specialised(self, traced: Traced, signature: Signature, autocast: bool, choice: Choice) -> fx.Graph:
        tenant = self._tenant
        return self.backend.specialise(
            traced,
            tenant.specialisation.structure,
            tenant.slot_value,
            training=signature.training,
            autocast=autocast,
            choice=choice,
            mode=signature.mode,
        )


def _penalise(output: Any, tenant: ActiveAdapters) -> None:
    """Add the regularisers of adapters to the loss, where the model gives one."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        for penalty in tenant.penalties:
            added = penalty()
            if added is not None:
                loss = loss + added.to(loss.device, loss.dtype)
        output.loss = loss


def _no_slots(*_: object) -> torch.Tensor:
    raise AssertionError("no adapter is active")


def _tokens(call: Call) -> int:
    """About how many rows the linears of the model see."""
    tensors = call.tensors
    if not tensors:
        return 1
    whole = tensors[0].numel()
    return max(1, whole if not tensors[0].is_floating_point() else whole // max(1, tensors[0].shape[-1]))


def _device_type(call: Call) -> str:
    return call.tensors[0].device.type if call.tensors else "cpu"
