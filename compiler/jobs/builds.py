"""compile: a spec onto a model, with a report of what went where, and a directory that holds the result."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import fx, nn

from peftc.compiler import diagram
from peftc.compiler.api import apply
from peftc.compiler.export_model.output import check_target, replaced, seal
from peftc.compiler.jobs.drawing import Inputs, active_names, as_found, can_render, graphs, needed_inputs
from peftc.compiler.load_model.models import FoundModel, seeded
from peftc.compiler.load_model.quantizing import description
from peftc.compiler.load_model.tokenizers import tokenizer_for
from peftc.compiler.report.facts import BuildFacts, ModelFacts
from peftc.compiler.report.summary import adapter_facts
from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.spec.spec import Spec
from peftc.grammar.spec.write import to_tree
from peftc.grammar.syntax.format import format_file
from peftc.passes.quantized.schemes.known import parameter_count
from peftc.runtime.model.model import AdaptedModel
from peftc.runtime.model.saving import versions
from peftc.runtime.peft_format.adapter_files import DEFAULT
from peftc.runtime.peft_format.manifest import spec_digest


@dataclass(frozen=True)
class Build:
    """What `build` made: the adapted model, the graphs its first call runs without and with adapters, the facts."""

    adapted: AdaptedModel
    before: fx.Graph
    after: fx.Graph
    facts: BuildFacts


def build(
    spec: Spec | str | PathLike[str],
    model: nn.Module | FoundModel | str | PathLike[str],
    directory: str | PathLike[str] | None = None,
    *,
    inputs: Inputs | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[str], object] | None = None,
) -> Build:
    """Compile a spec onto a model, and write the result into a directory if one is given.

    The directory gets `adapters/<name>/` in PEFT's format for every adapter, `graph.dot`, `graph.svg` where graphviz is
    installed, and `manifest.json`. It appears complete or not at all.

    Args:
        spec: A path to an `.adapter` file, the text itself, or a Spec.
        model: A module, or what `find_model` takes.
        directory: Where to write; nothing is written without one.
        inputs: To trace with; a transformers model needs none, a factory may give its own.
        seed: For the adapters' initial values. torch's global random state is left as it was.
        force: Replace a directory that is not an unchanged earlier build.
        progress: Called with what is done next, in a few words.

    Raises:
        SpecError: the spec is wrong, in itself or for this model.
        ModelError: the model cannot be found, loaded or traced.
        UsageError: the directory cannot be written, or holds something else.
        CheckpointError: an adapter's name cannot be a directory's.
    """
    tell = progress or (lambda _: None)
    target = None if directory is None else Path(directory)
    if target is not None:
        check_target(target, force=force)
    meant = spec if isinstance(spec, Spec) else read_spec(spec)
    tell("loading the model")
    found = as_found(model, meant)
    tell("resolving the spec")
    with seeded(seed):
        adapted = apply(found.model, meant, tokenizer=tokenizer_for(meant, found), dense=found.dense)
    tell(f"tracing {type(found.model).__name__}")
    before, after = graphs(adapted, needed_inputs(found, inputs))
    facts = _facts(adapted, found, seed)
    made = Build(adapted, before, after, facts)
    if target is None:
        return made
    tell(f"writing {target}")
    return replace(made, facts=_write(made, meant, target, seed))


def _facts(adapted: AdaptedModel, found: FoundModel, seed: int) -> BuildFacts:
    state = adapted._adapter_state
    ground = state.engine.backend.survey()
    weights = dict(state.active)
    adapters = tuple(
        adapter_facts(adapted.adapter_plan(name), ground, adapted.adapter_state_dict(name), weights.get(name))
        for name in state.names()
    )
    base = parameter_count(found.model)
    trained = sum(each.parameters for each in adapters)
    notes = list(found.notes)
    if stored := description(adapted):
        notes.append(f"the base is quantized, {stored}")
    if not weights:
        notes.append("no adapter starts active: the spec has several and no 'activate'")
    return BuildFacts(
        model=ModelFacts(found.name, type(found.model).__name__, found.origin, found.seed, base),
        adapters=adapters,
        parameters=trained,
        share=trained / (base + trained) if trained else 0.0,
        bytes=sum(each.bytes for each in adapters),
        notes=tuple(notes),
        warnings=found.warnings,
    )


def _write(made: Build, spec: Spec, target: Path, seed: int) -> BuildFacts:
    facts = made.facts
    notes = list(facts.notes)
    with replaced(target) as directory:
        for each in facts.adapters:
            _save(made.adapted, each.name, directory / "adapters", alone=len(facts.adapters) == 1)
        text = diagram.to_dot(diagram.build(made.after, names=active_names(made.adapted)))
        (directory / "graph.dot").write_text(text, encoding="utf-8")
        if can_render():
            (directory / "graph.svg").write_bytes(diagram.to_svg(text))
        else:
            notes.append("graph.svg was not drawn: graphviz (its command dot) is not installed")
        files = seal(directory, _manifest(made, spec, seed))
    return replace(facts, output=str(target), files=files, notes=tuple(notes))


def _save(adapted: AdaptedModel, name: str, root: Path, *, alone: bool) -> None:
    """Each adapter into a directory of its name, also those that PEFT would put one level up."""
    at = root / name if alone or name == DEFAULT else root
    adapted.save_pretrained(at, selected_adapters=[name])


def _manifest(made: Build, spec: Spec, seed: int) -> dict[str, Any]:
    text = format_file(to_tree(spec))
    base = made.adapted._adapter_state.base.facts
    model = made.facts.model
    return {
        "spec": text,
        "spec_sha256": spec_digest(text),
        "seed": seed,
        "versions": versions(),
        "model": {
            "name": model.name,
            "architecture": model.architecture,
            "origin": model.origin,
            "seed": model.seed,
            "parameters": model.parameters,
            "id": base.base_name,
            "revision": base.base_revision,
            "fingerprint": made.adapted.base_fingerprint(),
        },
        "active": {each.name: each.weight for each in made.facts.adapters if each.weight is not None},
        "adapters": {
            each.name: {
                "method": each.method,
                "parameters": each.parameters,
                "directory": f"adapters/{each.name}",
            }
            for each in made.facts.adapters
        },
    }
