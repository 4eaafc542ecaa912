"""What passes leave as it is and which modules are split, and why: what `peftc explain --why` tells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftc.compiler.api import apply
from peftc.compiler.example_calls import call_like
from peftc.compiler.jobs.drawing import Inputs, needed_inputs, with_tasks
from peftc.compiler.load_model.models import FoundModel, seeded
from peftc.compiler.load_model.tokenizers import tokenizer_for
from peftc.compiler.pipeline.managed import gathered_refusals
from peftc.compiler.report.facts import RefusalFacts
from peftc.compiler.trace.exporting import refuse
from peftc.grammar.diagnostics import AdapterError, ModelError
from peftc.grammar.spec.spec import Spec
from peftc.runtime.model.model import AdaptedModel
from peftc.runtime.regions.partition import Partition


@dataclass(frozen=True)
class Refused:
    """What passes left in the graph of the whole model, and where regions begin after a call.

    `untraced` says why there is no such graph, where a call needs none; else it is empty.
    """

    by_passes: tuple[RefusalFacts, ...]
    partition: Partition
    untraced: str = ""


def refusals(
    spec: Spec, found: FoundModel, together: Sequence[Sequence[str]], *, training: bool
) -> tuple[Refused, ...]:
    """For adapters that are active together, what is refused of a call like the example inputs.

    The model is traced, and called once where its weights have values. Raises ModelError where it cannot be, or there
    are no example inputs.
    """
    with seeded(found.seed or 0):
        # Any numbers do, as for a picture.
        example = (needed_inputs(found, None) for _ in range(1))
        adapted = apply(found.model, spec, calibration=example, tokenizer=tokenizer_for(spec, found))
    adapted.train(training)
    state = adapted._adapter_state
    weights = dict(spec.active)
    told = []
    for names in together:
        state.activate(tuple((name, weights.get(name, 1.0)) for name in names))
        inputs = with_tasks(adapted, needed_inputs(found, None))
        if not state.whole and not any(each.is_meta for each in adapted.parameters()):
            _call(adapted, inputs, training=training)
        told.append(_refused(adapted, inputs))
    return tuple(told)


def _refused(adapted: AdaptedModel, inputs: Inputs) -> Refused:
    state = adapted._adapter_state
    call = call_like(adapted, inputs)
    try:
        state.engine.traced(call)  # what the exporter leaves is nobody's refusal
    except ModelError as error:
        if state.whole:
            raise
        return Refused((), state.partition(), error.diagnostics[0].message)
    with gathered_refusals() as gathered:
        state.engine.program(call)
    facts = tuple(RefusalFacts(each.made_by, each.site, each.node, each.reason) for each in gathered)
    return Refused(facts, state.partition())


def _call(adapted: AdaptedModel, inputs: Inputs, *, training: bool) -> None:
    """Call the model once, so that its regions are tried. A region that is refused is told of by the partition."""
    named = inputs if isinstance(inputs, Mapping) else {}
    args: tuple[Any, ...] = (inputs,) if isinstance(inputs, torch.Tensor) else () if named else tuple(inputs)
    try:
        with torch.set_grad_enabled(training):
            adapted(*args, **named)
    except AdapterError:
        if not any(each.refused for each in adapted.region_partition().splits):
            raise
    except Exception as error:  # whatever the model's own code meets
        refuse(type(adapted).__name__, error)
