"""What the runtime needs from a compiler."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import fx, nn

from peftc.grammar.spec.spec import Base
from peftc.passes.cost.cost import Choice
from peftc.passes.insert.insert_delta import SlotValue
from peftc.passes.ir.traced import Traced
from peftc.passes.plan.resolve import ModelSurvey
from peftc.passes.plan.structure import Structure
from peftc.runtime.execution.call import Call
from peftc.runtime.execution.program import Lowered


class CompilerProtocol(Protocol):
    """What the runtime needs from a compiler: traces, graphs and plans for one model."""

    def trace(self, call: Call) -> Traced:
        """The base graph for calls of this signature."""
        ...

    def specialise(
        self,
        traced: Traced,
        structure: Structure,
        slot_value: SlotValue,
        *,
        training: bool,
        autocast: bool,
        choice: Choice,
        mode: str,
        region: nn.Module | None = None,
    ) -> fx.Graph:
        """The base graph with adapters of this structure in it, widened in a way; the trace is left as it is.

        The graph is that of the whole model, or of a `region` of it.
        """
        ...

    def lower(self, graph: fx.Graph, *, autocast: bool, choice: Choice, by_row: bool = False) -> Lowered:
        """Copies of a specialised graph: for torch.compile to trace, and for Python to run as it is.

        With `by_row` every row has an adapter of its own; raises ModelError where an operator has no form for that.
        """
        ...

    def trace_region(self, module: nn.Module, call: Any) -> Any:
        """The graph of a module by itself: see `peftc.runtime.regions`. Raises ModelError for what has none."""
        ...

    def trace_weights(self, module: nn.Module, names: Sequence[str]) -> Traced:
        """The graph that gives these tensors of a module's own, for one whose forward has no graph."""
        ...

    def takes_cache(self, call: Call) -> bool:
        """Whether the model can be given keys and values that attention sees beside the call's own."""
        ...

    def survey(self) -> ModelSurvey:
        """What there is to adapt on the model, without what is merged."""
        ...

    def check_base(self, base: Base | None) -> None:
        """Raise SpecError unless the model is, is stored and is run as a spec demands."""
        ...

    def step(self, what: str) -> AbstractContextManager[None]:
        """Around what a call waits for, which is said on the terminal if it takes long."""
        ...

    def for_model(self, model: nn.Module) -> "CompilerProtocol":
        """The same compiler for a copy of the model."""
        ...
