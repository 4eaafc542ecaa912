"""Pictures of a model's graph before and after its adapters."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Literal

import torch
from torch import fx, nn

from peftc.compiler import diagram
from peftc.compiler.api import apply
from peftc.compiler.example_calls import call_like
from peftc.compiler.load_model.models import FoundModel, find_model, seeded
from peftc.compiler.load_model.tokenizers import tokenizer_for
from peftc.compiler.pipeline.lower import specialise
from peftc.compiler.trace.example_inputs import example_inputs
from peftc.grammar.diagnostics import ModelError, SpecError, fail
from peftc.grammar.source import Source
from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.spec.no_match import misses
from peftc.grammar.spec.select import matches_inside
from peftc.grammar.spec.spec import Spec
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.parse import parse
from peftc.passes.foreign.peft import TASK_IDS
from peftc.passes.plan.resolve import survey
from peftc.passes.plan.structure import Structure
from peftc.runtime.model.model import AdaptedModel

Which = Literal["before", "after", "diff"]
Format = Literal["dot", "json", "svg", "png", "pdf"]
Inputs = Sequence[Any] | Mapping[str, Any]

PLAIN = 2  # axes of a prompt that is the same for every task


def draw(
    spec: Spec | str | PathLike[str],
    model: nn.Module | FoundModel | str | PathLike[str],
    *,
    which: Which = "after",
    focus: str | None = None,
    unfold: bool = False,
    format: Format = "dot",
    inputs: Inputs | None = None,
) -> bytes:
    """A diagram of the graph: what `peftc graph` prints.

    Args:
        spec: A path to an `.adapter` file, the text itself, or a Spec.
        model: A module, or what `find_model` takes.
        which: The graph before the adapters, after, or after with what is new or gone marked.
        focus: A selector; only what it names and its surroundings are drawn.
        unfold: Draw every layer of a run of alike ones.
        format: Graphviz text, JSON for other tools, or a picture that graphviz draws.
        inputs: To trace with; a transformers model needs none.

    Raises:
        SpecError: the spec or the focus is wrong, in itself or for this model.
        ModelError: the model cannot be found or traced.
        UsageError: a picture is asked for and graphviz is not installed.
    """
    if format in diagram.DRAWN:
        diagram.graphviz()
    meant = spec if isinstance(spec, Spec) else read_spec(spec)
    found = as_found(model, meant)
    with seeded(found.seed or 0):
        # Any numbers do for a picture: what starts from data starts from the example, if there is one.
        example = (needed_inputs(found, inputs) for _ in range(1))
        adapted = apply(found.model, meant, calibration=example, tokenizer=tokenizer_for(meant, found))
    shown = None if focus is None else within(focus, found.model)
    before, after = graphs(adapted, needed_inputs(found, inputs))
    names = active_names(adapted)
    if which == "diff":
        picture = diagram.diff(before, after, unfold=unfold, focus=shown, names=names)
    else:
        picture = diagram.build(before if which == "before" else after, unfold=unfold, focus=shown, names=names)
    if format == "json":
        return diagram.to_json(picture).encode()
    text = diagram.to_dot(picture)
    return text.encode() if format == "dot" else diagram.render(text, format)


def graphs(adapted: AdaptedModel, inputs: Inputs) -> tuple[fx.Graph, fx.Graph]:
    """The graph for calls like this one, without adapters and with the active ones. Raises ModelError."""
    call = call_like(adapted, with_tasks(adapted, inputs))
    engine = adapted._adapter_state.engine
    traced = engine.traced(call)
    before = specialise(traced, Structure(), _no_slot, training=call.signature.training, autocast=False)
    return before, engine.graph(call)


def with_tasks(adapted: AdaptedModel, inputs: Inputs) -> Inputs:
    """The inputs, and the first task for every row where the active adapters have tasks and the inputs name none."""
    plans = [adapted.adapter_plan(name) for name in active_names(adapted)]
    has_tasks = any(len(at.front) > PLAIN for plan in plans for at in plan.sites)
    if not has_tasks or not isinstance(inputs, Mapping) or TASK_IDS in inputs:
        return inputs
    rows = next((each.shape[0] for each in inputs.values() if isinstance(each, torch.Tensor) and each.dim()), 1)
    return {**inputs, TASK_IDS: torch.zeros(rows, dtype=torch.int64)}


def active_names(adapted: AdaptedModel) -> tuple[str, ...]:
    """The active adapters, by their position in the graph."""
    return tuple(name for name, _ in adapted._adapter_state.active)


def as_found(model: nn.Module | FoundModel | str | PathLike[str], spec: Spec | None = None) -> FoundModel:
    """The model meant, with where it is from; packed and of the class that the spec says. Raises ModelError."""
    if isinstance(model, FoundModel):
        return model
    if isinstance(model, nn.Module):
        return FoundModel(model, type(model).__name__, "object")
    return find_model(model, quantize=None if spec is None else spec.quantize, adapters=spec)


def needed_inputs(found: FoundModel, inputs: Inputs | None) -> Inputs:
    """Inputs to trace with: those given, the factory's, or made from the config. Raises ModelError for none."""
    for each in (inputs, found.example_inputs, example_inputs(found.model)):
        if each is not None:
            return each
    fail(
        ModelError,
        "E440",
        f"there are no example inputs to trace {type(found.model).__name__} with",
        help="let the factory return (module, example_inputs)",
        where=found.name,
    )


def within(focus: str, model: nn.Module) -> Callable[[str], bool]:
    """Whether a module is one that a selector chooses, or inside one. Raises SpecError for one that chooses nothing."""
    try:
        # A selector has no file of its own; on a line of its own in one, its messages show it alone.
        clause = parse(Source("--focus", f"adapter focus = focus {{ on\n{focus}\n}}")).statements[0]
    except SpecError as error:
        raise SpecError(*(replace(each, span=None, where="--focus") for each in error.diagnostics)) from None
    assert isinstance(clause, tree.Adapter)
    assert isinstance(clause.clauses[0], tree.OnClause)
    selectors = clause.clauses[0].selectors
    universe = survey(model).universe
    missed = [each for selector in selectors for each in misses(selector, None, universe, modules=True)]
    if missed:
        raise SpecError(*(replace(each, span=None, where="--focus") for each in missed))
    return lambda module: any(matches_inside(each, module, universe) for each in selectors)


def can_render() -> bool:
    """Whether graphviz is installed."""
    return shutil.which("dot") is not None


def _no_slot(position: int, site: str, role: str, near: fx.Node) -> torch.Tensor:
    raise AssertionError("a graph without adapters has no slots")
