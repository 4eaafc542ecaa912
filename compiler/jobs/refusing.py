"""What passes leave as it is, and why: what `peftc explain --why` tells."""

from collections.abc import Sequence

from peftc.compiler.api import apply, call_like
from peftc.compiler.jobs.drawing import needed_inputs, with_tasks
from peftc.compiler.load_model.models import FoundModel, seeded
from peftc.compiler.load_model.tokenizers import tokenizer_for
from peftc.compiler.pipeline.managed import gathered_refusals
from peftc.compiler.report.facts import RefusalFacts
from peftc.grammar.spec.spec import Spec


def refusals(
    spec: Spec, found: FoundModel, together: Sequence[Sequence[str]], *, training: bool
) -> tuple[tuple[RefusalFacts, ...], ...]:
    """For adapters that are active together, what passes refuse in the graph of a call like the example inputs.

    The model is traced. Raises ModelError where it cannot be, or there are no example inputs.
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
        call = call_like(adapted, with_tasks(adapted, needed_inputs(found, None)))
        state.engine.traced(call)  # what the exporter leaves is nobody's refusal
        with gathered_refusals() as gathered:
            state.engine.program(call)
        told.append(tuple(RefusalFacts(each.made_by, each.site, each.node, each.reason) for each in gathered))
    return tuple(told)
