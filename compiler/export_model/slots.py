"""Where graphs read the tensors of adapters, and what programs call these."""

from collections.abc import Callable, Mapping

import torch
from torch import fx, nn

from peftc.grammar.diagnostics import ModelError, fail
from peftc.passes.export.bank_pieces import CONSTANT
from peftc.passes.export.exported import ADAPTER
from peftc.passes.ir.emit import Origin
from peftc.passes.ir.traced import Traced
from peftc.runtime.execution.engine import ADAPTERS, Engine
from peftc.runtime.files.tensor_file import in_file
from peftc.runtime.model.model import AdaptedModel

ValueAt = Callable[[str], torch.Tensor]
"""The tensor at an attribute path."""


def state_name(name: str) -> str:
    """What a program calls an adapter's tensor among its own."""
    return f"{ADAPTER}.{name}"


def slots_of(graph: fx.Graph, known: Mapping[str, str]) -> dict[str, str]:
    """What the graph reads of the active adapters, by names; what tied weights share has the name of the first.

    `known` are the slots of the programs beside it, which name them for all: a decode has no encoder.
    """
    names = {target: name for name, target in known.items()}
    read = dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr") if _is_slot(node))
    for node in graph.find_nodes(op="get_attr"):
        if _is_slot(node):
            names.setdefault(str(node.target), _slot_name(node))
    return {names[target]: target for target in read}


def in_slots(adapted: AdaptedModel, slots: Mapping[str, str], adapter: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors that belong in these slots, by name and in the order of files.

    What it has not is left out.
    """
    state = adapted._adapter_state
    own = state.engine.slots.tensors(state.adapter(adapter))
    found = {name: own[target].detach() for name, target in slots.items() if target in own}
    return {name: found[name] for name in sorted(found, key=lambda name: in_file(name, found[name].dtype))}


class SlotValues:
    """Finds the tensor an attribute of a graph reads, and a name for it. Tied weights have one."""

    def __init__(self, engine: Engine, traced: Traced, slots: Mapping[str, str], sample: ValueAt | None):
        self._engine, self._traced, self._sample = engine, traced, sample
        self._slots = {target: state_name(name) for name, target in slots.items()}
        self._names: dict[int, str] = {}

    def __call__(self, target: str) -> tuple[str, torch.Tensor]:
        """The name and the tensor at an attribute path. Raises ModelError where there is something else."""
        if target in self._traced.constants:
            value = self._traced.constants[target]
            if isinstance(value, nn.Module):
                help = "it has a higher-order operator (a condition or a loop), which no program takes along"
                fail(ModelError, "E645", f"the graph reads {target}, which is not a tensor", help=help)
            return f"{CONSTANT}{target}", value
        if target in self._slots:
            value = read(self._engine, target) if self._sample is None else self._sample(target)
            return self._slots[target], value
        value = read(self._engine, target)
        return self._names.setdefault(id(value), target), value


def read(engine: Engine, target: str) -> torch.Tensor:
    """The tensor that an attribute of a graph is."""
    owner, _, leaf = target.rpartition(".")
    value = getattr(engine.find(owner), leaf)
    assert isinstance(value, torch.Tensor)
    return value


def _is_slot(node: fx.Node) -> bool:
    return str(node.target).startswith(ADAPTERS)


def _slot_name(node: fx.Node) -> str:
    """`model.layers.0.self_attn.q_proj.A`; with a number in front for adapters that are active beside the first."""
    origin: Origin = node.meta["peftc"]
    role = origin.role or str(node.target).rpartition(".")[2]
    name = f"{origin.site}.{role}".lstrip(".")
    return f"{origin.position}.{name}" if origin.position else name
